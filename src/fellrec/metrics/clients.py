"""The metric of federated evaluation: ranking metrics of every user, averaged per client and over all users."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from fellrec.functional.candidates import sampled_name
from fellrec.functional.first_items import FirstItems
from fellrec.functional.ranking import METRICS, ranking_metrics
from fellrec.metrics.summary import client_means, group_figures, honest_figures, member_figures, summarise, user_mean
from fellrec.types import Evaluation


class UserMetrics(NamedTuple):
    """The states of the metric; the last three are empty where rankings are not kept.

    Attributes:
        users: ``[U]`` int64 user indices.
        clients: ``[U]`` int64 client of each.
        values: ``[U, M + R]`` float64: the metrics, then the values that the ranker reports.
        items: ``[U · K]`` int64 first items, one user after the other. Flat, so that a process without users, which
            does not know K, has states of a compatible shape.
        scores: ``[U · K]`` float32 scores of these items.
        is_tied: ``[U]`` bool, see ``FirstItems``.
    """

    users: Tensor
    clients: Tensor
    values: Tensor
    items: Tensor
    scores: Tensor
    is_tied: Tensor

    def of_clients(self, clients: Iterable[int]) -> UserMetrics:
        """Those of the users of some clients."""
        inside = torch.isin(self.clients, torch.tensor(sorted(clients), device=self.clients.device))
        kept = [part.reshape(len(inside), -1)[inside].flatten() if part.numel() else part for part in self[3:]]
        return UserMetrics(self.users[inside], self.clients[inside], self.values[inside], *kept)

    def joined(self, other: UserMetrics) -> UserMetrics:
        """The users of both."""
        return UserMetrics(*(torch.cat(parts) for parts in zip(self, other, strict=True)))


class ClientRankingMetrics(Metric):
    """Keeps each user's metrics and returns them per user, per client and pooled.

    Users are sorted before anything is averaged, and a user that several processes evaluated (a sampler that pads)
    counts once, so the result is bit-identical for any number of processes and batches.

    Args:
        num_clients: C.
        cutoffs: The K, already checked with ``fellrec.functional.ranking.check_cutoffs``.
        groups: Stage → name → ``[U]`` bool, one flag per user index: groups that have metrics of their own.
        reported: Names of the values that a ranker reports of each user; see ``ReportingRanker``.
        num_candidates: N, if targets are also ranked among a sample of N items; ``None`` if not.
        members: Of a federation of data sets, the clients of each by its name: metrics of their own, see
            ``member_figures``.
        poisoned: Clients that misbehave: the others have metrics of their own, see ``honest_figures``.
        **kwargs: As for ``torchmetrics.Metric``.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    users: list[Tensor]
    clients: list[Tensor]
    values: list[Tensor]
    items: list[Tensor]
    scores: list[Tensor]
    is_tied: list[Tensor]

    def __init__(
        self,
        num_clients: int,
        cutoffs: Sequence[int],
        groups: Mapping[str, Mapping[str, Tensor]] | None = None,
        reported: Sequence[str] = (),
        num_candidates: int | None = None,
        members: Mapping[str, range] | None = None,
        poisoned: Sequence[int] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.groups = dict(groups or {})
        self.members = dict(members or {})
        self.poisoned = tuple(sorted(poisoned))
        self.num_clients = num_clients
        self.cutoffs = tuple(cutoffs)
        full = tuple(f"{name}_at_{cutoff}" for cutoff in self.cutoffs for name in METRICS)
        sampled = () if num_candidates is None else tuple(sampled_name(name, num_candidates) for name in full)
        self.names = full + sampled
        self.reported = tuple(reported)
        for name in UserMetrics._fields:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        users: Tensor,
        clients: Tensor,
        ranks: Tensor,
        rows: Tensor,
        reported: Tensor | None = None,
        first: FirstItems | None = None,
        sampled_ranks: Tensor | None = None,
    ) -> None:
        """Add a batch of users.

        Args:
            users: ``[B]`` int64 user indices.
            clients: ``[B]`` int64 client of each.
            ranks: ``[T]`` int64 ranks of all their targets, from ``fellrec.functional.ranking.target_ranks``.
            rows: ``[T]`` int64 position in ``users`` of each target. A user without targets is not evaluated: it is
                left out and not counted.
            reported: ``[B, R]`` float64; ``None`` if the ranks are not those of the ranker that reports.
            first: Their first items, to be kept; given for all batches of an evaluation, or for none.
            sampled_ranks: As ``ranks``, among the sample; if and only if ``num_candidates`` is set.
        """
        rankings = [ranks] if sampled_ranks is None else [ranks, sampled_ranks]
        metrics = [ranking_metrics(ranks_T, rows, len(users), self.cutoffs).values() for ranks_T in rankings]
        values = torch.stack([column for columns in metrics for column in columns], dim=1)
        evaluated = ~values.isnan().any(dim=1)
        if reported is None:
            reported = values.new_full((len(users), len(self.reported)), torch.nan)
        values = torch.cat([values, reported.to(values)], dim=1)
        parts = [users.cpu()[evaluated], clients.cpu()[evaluated], values[evaluated]]
        kept = self._empty()[3:] if first is None else [field.cpu()[evaluated].flatten() for field in first]
        self.add(*parts, *kept)

    def add(self, *taken: Tensor) -> None:
        """Add the states that `take` returned in another process."""
        self._computed, self._update_count = None, self._update_count + 1  # as torchmetrics does in `update`
        for name, part in zip(UserMetrics._fields, taken, strict=True):
            getattr(self, name).append(part.to(self.device))

    def take(self) -> UserMetrics:
        """Return all states and reset."""
        taken = [torch.cat(list(getattr(self, name))) for name in UserMetrics._fields] if self.users else self._empty()
        self.reset()
        return UserMetrics(*taken)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in torchmetrics; a process without users takes part with empty states of the right type and shape."""
        if not self.users:
            self.add(*self._empty())
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Any]:
        """Metrics of the users of all processes.

        Returns:
            ``users`` and ``client_of_user`` ``[U]`` int64, ascending by user; ``per_user`` and ``per_client``: metric
            name → ``[U]`` or ``[C]`` float64; ``pooled``: metric name → mean over users; ``reported``: name → ``[U]``
            float64; ``items``, ``scores`` and ``is_tied`` as in ``FirstItems``, empty if they are not kept. All on the
            CPU. torchmetrics returns tensors with one element as scalars; `evaluation` undoes that.
        """
        users, client_of_user, values, items, scores, is_tied = self._sorted_by_user()
        columns = values.T.contiguous()
        per_user = dict(zip(self.names, columns, strict=False))
        return {
            "users": users,
            "client_of_user": client_of_user,
            "per_user": per_user,
            "per_client": {
                name: client_means(column, client_of_user, self.num_clients) for name, column in per_user.items()
            },
            "pooled": {name: user_mean(column) for name, column in per_user.items()},
            "reported": dict(zip(self.reported, columns[len(self.names) :], strict=True)),
            "items": items,
            "scores": scores,
            "is_tied": is_tied.reshape(-1),
        }

    def evaluation(self, stage: str, round_index: int) -> Evaluation:
        """The same as the record that the loop logs; see ``fellrec.metrics.summary.summarise``.

        Args:
            stage: ``"val"`` or ``"test"``.
            round_index: Round after which the evaluation ran.
        """
        result = self.compute()
        per_user = _vectors(result["per_user"])
        users, client_of_user = result["users"].reshape(-1), result["client_of_user"].reshape(-1)
        evaluation = summarise(per_user, client_of_user, self.num_clients, stage, round_index, users)
        groups = {name: is_inside[users] for name, is_inside in self.groups.get(stage, {}).items()}
        items, scores, is_tied = (result[name] for name in FirstItems._fields)
        return replace(
            evaluation,
            summary={
                **evaluation.summary,
                **group_figures(per_user, groups),
                **member_figures(evaluation, self.members),
                **honest_figures(evaluation, self.poisoned, self.num_clients),
            },
            poisoned=self.poisoned,
            first_items=FirstItems(items, scores, is_tied.reshape(-1)) if items.numel() else None,
            reported=_vectors(result["reported"]),
        )

    def _sorted_by_user(self) -> list[Tensor]:
        """All states, one row per user."""
        states = [getattr(self, name) for name in UserMetrics._fields]
        if not isinstance(self.users, Tensor) and not self.users:
            states = self._empty()
        users, clients, values, *kept = (dim_zero_cat(state).cpu() for state in states)
        first = torch.from_numpy(np.unique(users.numpy(), return_index=True)[1])
        rows = [part.reshape(len(users), -1)[first] if part.numel() else part.reshape(0, 0) for part in kept]
        return [users[first], clients[first], values[first], *rows]

    def _empty(self) -> list[Tensor]:
        none = torch.empty(0, dtype=torch.int64)
        values = torch.empty(0, len(self.names) + len(self.reported), dtype=torch.float64)
        return [none, none, values, none, torch.empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.bool)]


def _vectors(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: column.reshape(-1) for name, column in columns.items()}
