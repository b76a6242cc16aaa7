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

from fellrec.functional.first_items import FirstItems
from fellrec.functional.ranking import METRICS, ranking_metrics
from fellrec.metrics.summary import client_means, group_figures, summarise, user_mean
from fellrec.types import Evaluation


class UserMetrics(NamedTuple):
    """What is kept of some users; the last three are empty where rankings are not kept.

    Attributes:
        users: ``[U]`` int64 user indices.
        clients: ``[U]`` int64 client of each.
        values: ``[U, M]`` float64 metrics.
        items: ``[U * K]`` int64 first items, one user after the other. Flat, so that a process without users, which
            does not know K, has states that fit.
        scores: ``[U * K]`` float32 scores of these.
        is_tied: ``[U]`` bool, see ``FirstItems``.
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

    Args:
        num_clients: C.
        cutoffs: The K, already checked with ``fellrec.functional.ranking.check_cutoffs``.
        groups: Stage → name → ``[U]`` bool, one flag per user index: users whose figures are given on their own too.
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.groups = dict(groups or {})
        self.num_clients = num_clients
        self.cutoffs = tuple(cutoffs)
        self.names = tuple(f"{name}_at_{cutoff}" for cutoff in self.cutoffs for name in METRICS)
        for name in UserMetrics._fields:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(
        self, users: Tensor, clients: Tensor, ranks: Tensor, rows: Tensor, first: FirstItems | None = None
    ) -> None:
        """Add a batch of users.

        Args:
            users: ``[B]`` int64 user indices.
            clients: ``[B]`` int64 client of each.
            ranks: ``[T]`` int64 ranks of all their targets, from ``fellrec.functional.ranking.target_ranks``.
            rows: ``[T]`` int64 position in ``users`` of each target. A user without targets is not evaluated: it is
                left out and not counted.
            first: Their first items, to be kept; for all batches of an evaluation, or for none.
        """
        metrics = ranking_metrics(ranks, rows, len(users), self.cutoffs)
        values = torch.stack([metrics[name] for name in self.names], dim=1)
        evaluated = ~values.isnan().any(dim=1)
        parts = [users.cpu()[evaluated], clients.cpu()[evaluated], values[evaluated]]
        parts += self._nothing()[3:] if first is None else [part.cpu()[evaluated].flatten() for part in first]
        self.add(*parts)

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
            name → ``[U]`` or ``[C]`` float64; ``pooled``: metric name → mean over users; ``items``, ``scores`` and
            ``is_tied`` as in ``FirstItems``, empty if they are not kept. All on the CPU. Tensors with one element come
            back as scalars, as torchmetrics does with every result; `evaluation` undoes it.
        """
        users, client_of_user, values, items, scores, is_tied = self._sorted_by_user()
        per_user = dict(zip(self.names, values.T.contiguous(), strict=True))
        return {
            "users": users,
            "client_of_user": client_of_user,
            "per_user": per_user,
            "per_client": {
                name: client_means(column, client_of_user, self.num_clients) for name, column in per_user.items()
            },
            "pooled": {name: user_mean(column) for name, column in per_user.items()},
            "items": items,
            "scores": scores,
            "is_tied": is_tied,
        }

    def evaluation(self, stage: str, round_index: int) -> Evaluation:
        """The same as the record that the loop logs; see ``fellrec.metrics.summary.summarise``."""
        result = self.compute()
        per_user = {name: column.reshape(-1) for name, column in result["per_user"].items()}
        users, client_of_user = result["users"].reshape(-1), result["client_of_user"].reshape(-1)
        evaluation = summarise(per_user, client_of_user, self.num_clients, stage, round_index, users)
        groups = {name: is_inside[users] for name, is_inside in self.groups.get(stage, {}).items()}
        items = result["items"]
        first = FirstItems(items, result["scores"], result["is_tied"].reshape(-1)) if items.numel() else None
        return replace(evaluation, summary={**evaluation.summary, **group_figures(per_user, groups)}, first_items=first)

    def _sorted_by_user(self) -> list[Tensor]:
        """All states, one row per user."""
        states = [getattr(self, name) for name in UserMetrics._fields]
        if not isinstance(self.users, Tensor) and not self.users:
            states = self._nothing()
        users, *others = (dim_zero_cat(state).cpu() for state in states)
        first = torch.from_numpy(np.unique(users.numpy(), return_index=True)[1])
        rows = [part.reshape(len(users), -1)[first] if part.numel() else part.reshape(0, 0) for part in others[2:4]]
        is_tied = others[4][first] if others[4].numel() else others[4]
        return [users[first], others[0][first], others[1][first], *rows, is_tied]

    def _nothing(self) -> list[Tensor]:
        none = torch.empty(0, dtype=torch.int64)
        values = torch.empty(0, len(self.names), dtype=torch.float64)
        return [none, none, values, none, torch.empty(0, dtype=torch.float32), torch.empty(0, dtype=torch.bool)]
