"""The metric of the federated loop: ranking metrics of every user, by client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from fellrec.metrics.summary import best_choice, client_means, group_figures, summarise, user_mean
from fellrec.types import Evaluation


class UserMetrics(NamedTuple):
    """What is kept of some users; the last three are empty where rankings are not kept.

    Attributes:
        users: ``[U]`` int64 user indices.
        clients: ``[U]`` int64 client of each.
        values: ``[U, G · M + R]`` float64: metrics for each choice of the ranker, and what it tells of the user.
        items: ``[U · G · K]`` int64 first items, one user after the other. Flat, so that a process without users,
            which does not know K, has states that fit.
        scores: ``[U · G · K]`` float32 scores of these.
        is_tied: ``[U · G]`` bool, see ``FirstItems``.
    """

    users: Tensor
    clients: Tensor
    values: Tensor
    items: Tensor
    scores: Tensor
    is_tied: Tensor


class ClientRankingMetrics(Metric):
    """Keeps each user's metrics and gives them per user, per client and pooled.

    Users are sorted before anything is averaged, and a user that several processes evaluated (a sampler that pads)
    counts once, so the result is the same, to the last bit, whatever the number of processes and of batches.

    A ranker with an open setting is evaluated with each of its choices; the figures are those of one of them.

    Args:
        num_clients: C.
        cutoffs: The K, already checked with ``fellrec.functional.ranking.check_cutoffs``.
        groups: Stage → name → ``[U]`` bool, one flag per user index: users whose figures are given on their own too.
        reported: Names of what a ranker tells of each user beside the ranks; see ``ReportingRanker``.
        num_choices: G, settings that every user is ranked with.
        metric: What a choice is made by; ``None`` is the first of the metrics.
        num_candidates: N, if targets are ranked among a sample of N items too; ``None`` if not.
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
        num_choices: int = 1,
        metric: str | None = None,
        num_candidates: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.groups = dict(groups or {})
        self.num_clients = num_clients
        self.cutoffs = tuple(cutoffs)
        full = tuple(f"{name}_at_{cutoff}" for cutoff in self.cutoffs for name in METRICS)
        sampled = () if num_candidates is None else tuple(sampled_name(name, num_candidates) for name in full)
        self.names = full + sampled
        self.reported = tuple(reported)
        self.num_choices = num_choices
        self.metric = metric or self.names[0]
        self._choice: int | None = None
        for name in UserMetrics._fields:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self,
        users: Tensor,
        clients: Tensor,
        ranks: Tensor,
        rows: Tensor,
        reported: Tensor | None = None,
        first: Sequence[FirstItems] | None = None,
        sampled_ranks: Tensor | None = None,
    ) -> None:
        """Add a batch of users.

        Args:
            users: ``[B]`` int64 user indices.
            clients: ``[B]`` int64 client of each.
            ranks: ``[T]`` int64 ranks of all their targets, from ``fellrec.functional.ranking.target_ranks``; or
                ``[G, T]``, those of each choice. ``[T]`` are the same for every choice.
            rows: ``[T]`` int64 position in ``users`` of each target. A user without targets is not evaluated: it is
                left out and not counted.
            reported: ``[B, R]`` float64; ``None`` if the ranks are not those of the ranker that reports.
            first: Their first items by each choice, to be kept; for all batches of an evaluation, or for none.
            sampled_ranks: As ``ranks``, among the sample; if and only if there is one.
        """
        rankings = [ranks] if sampled_ranks is None else [ranks, sampled_ranks]
        by_choice = torch.cat([self._of_users(each, rows, len(users)) for each in rankings], dim=2)
        values = by_choice.expand(-1, self.num_choices, -1).flatten(1)
        evaluated = ~values.isnan().any(dim=1)
        if reported is None:
            reported = values.new_full((len(users), len(self.reported)), torch.nan)
        values = torch.cat([values, reported.to(values)], dim=1)
        parts = [users.cpu()[evaluated], clients.cpu()[evaluated], values[evaluated]]
        kept = self._nothing()[3:]
        if first is not None:
            of_fields = [torch.stack(field, dim=1) for field in zip(*first, strict=True)]
            kept = [field.cpu()[evaluated].flatten() for field in of_fields]
        self.add(*parts, *kept)

    def _of_users(self, ranks: Tensor, rows: Tensor, num_users: int) -> Tensor:
        """``[B, G, M]`` float64, all metrics by ``ranks``."""
        of_choices = [ranking_metrics(ranks_T, rows, num_users, self.cutoffs) for ranks_T in torch.atleast_2d(ranks)]
        return torch.stack([torch.stack(list(metrics.values()), dim=1) for metrics in of_choices], dim=1)

    def add(self, *taken: Tensor) -> None:
        """Add what another process's `take` gave."""
        for name, part in zip(UserMetrics._fields, taken, strict=True):
            getattr(self, name).append(part.to(self.device))

    def take(self) -> UserMetrics:
        """Everything so far, which is forgotten here."""
        taken = (
            [torch.cat(list(getattr(self, name))) for name in UserMetrics._fields] if self.users else self._nothing()
        )
        self.reset()
        return UserMetrics(*taken)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in torchmetrics; a process that had no users takes part with empty states of the right type and shape."""
        if not self.users:
            self.add(*self._nothing())
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Any]:
        """Figures of all processes' users.

        Returns:
            ``users`` and ``client_of_user`` ``[U]`` int64, ascending by user; ``per_user`` and ``per_client``: metric
            name → ``[U]`` or ``[C]`` float64; ``pooled``: metric name → mean over users; ``reported``: name → ``[U]``
            float64; ``choice``: whose metrics these are; ``items``, ``scores`` and ``is_tied`` as in ``FirstItems``,
            empty if they are not kept. All on the CPU. Tensors with one element come back as scalars, as torchmetrics
            does with every result; `evaluation` undoes it.
        """
        users, client_of_user, values, items, scores, is_tied = self._sorted_by_user()
        num_metrics = len(self.names)
        by_choice = values[:, : self.num_choices * num_metrics].reshape(len(users), self.num_choices, num_metrics)
        choice = self._choice
        if choice is None:
            by_metric = by_choice[:, :, self.names.index(self.metric)]
            choice = best_choice(by_metric, client_of_user, self.num_clients)
        per_user = dict(zip(self.names, by_choice[:, choice].T.contiguous(), strict=True))
        reported = values[:, self.num_choices * num_metrics :].T.contiguous()
        return {
            "users": users,
            "client_of_user": client_of_user,
            "per_user": per_user,
            "per_client": {
                name: client_means(column, client_of_user, self.num_clients) for name, column in per_user.items()
            },
            "pooled": {name: user_mean(column) for name, column in per_user.items()},
            "reported": dict(zip(self.reported, reported, strict=True)),
            "choice": choice,
            "items": self._of_choice(items, choice),
            "scores": self._of_choice(scores, choice),
            "is_tied": self._of_choice(is_tied, choice).reshape(-1),
        }

    def evaluation(self, stage: str, round_index: int, choice: int | None = None) -> Evaluation:
        """The same as the record that the loop logs; see ``fellrec.metrics.summary.summarise``.

        Args:
            stage: ``"val"`` or ``"test"``.
            round_index: Round after which the evaluation ran.
            choice: Which of the ranker's choices counts; ``None`` takes the best for these users, the first of equals.
        """
        self._choice, self._computed = choice, None
        result = self.compute()
        per_user = _vectors(result["per_user"])
        users, client_of_user = result["users"].reshape(-1), result["client_of_user"].reshape(-1)
        evaluation = summarise(per_user, client_of_user, self.num_clients, stage, round_index, users)
        groups = {name: is_inside[users] for name, is_inside in self.groups.get(stage, {}).items()}
        items = result["items"]
        first = FirstItems(items, result["scores"], result["is_tied"].reshape(-1)) if items.numel() else None
        return replace(
            evaluation,
            summary={**evaluation.summary, **group_figures(per_user, groups)},
            first_items=first,
            reported=_vectors(result["reported"]),
            choice=int(result["choice"]),
        )

    def _sorted_by_user(self) -> list[Tensor]:
        """All states, one row per user."""
        states = [getattr(self, name) for name in UserMetrics._fields]
        if not isinstance(self.users, Tensor) and not self.users:
            states = self._nothing()
        users, clients, values, *kept = (dim_zero_cat(state).cpu() for state in states)
        first = torch.from_numpy(np.unique(users.numpy(), return_index=True)[1])
        rows = [part.reshape(len(users), -1)[first] if part.numel() else part.reshape(0, 0) for part in kept]
        return [users[first], clients[first], values[first], *rows]

    def _of_choice(self, kept: Tensor, choice: int) -> Tensor:
        """``[U, K]`` of ``[U, G · K]``."""
        if not kept.numel():
            return kept
        return kept.reshape(len(kept), self.num_choices, -1)[:, choice]

    def _nothing(self) -> list[Tensor]:
        none = torch.empty(0, dtype=torch.int64)
        columns = self.num_choices * len(self.names) + len(self.reported)
        values = torch.empty(0, columns, dtype=torch.float64)
        return [none, none, values, none, torch.empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.bool)]


def _vectors(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: column.reshape(-1) for name, column in columns.items()}
