"""The metric of the federated loop: ranking metrics of every user, by client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from fellrec.functional.ranking import METRICS, ranking_metrics
from fellrec.metrics.summary import best_choice, client_means, summarise, user_mean
from fellrec.types import Evaluation


class ClientRankingMetrics(Metric):
    """Keeps each user's metrics and gives them per user, per client and pooled.

    Users are sorted before anything is averaged, and a user that several processes evaluated (a sampler that pads)
    counts once, so the result is the same, to the last bit, whatever the number of processes and of batches.

    A ranker with an open setting is evaluated with each of its choices; the figures are those of one of them.

    Args:
        num_clients: C.
        cutoffs: The K, already checked with ``fellrec.functional.ranking.check_cutoffs``.
        reported: Names of what a ranker tells of each user beside the ranks; see ``ReportingRanker``.
        num_choices: G, settings that every user is ranked with.
        metric: What a choice is made by; ``None`` is the first of the metrics.
        **kwargs: As for ``torchmetrics.Metric``.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    users: list[Tensor]
    clients: list[Tensor]
    values: list[Tensor]

    def __init__(
        self,
        num_clients: int,
        cutoffs: Sequence[int],
        reported: Sequence[str] = (),
        num_choices: int = 1,
        metric: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_clients = num_clients
        self.cutoffs = tuple(cutoffs)
        self.names = tuple(f"{name}_at_{cutoff}" for cutoff in self.cutoffs for name in METRICS)
        self.reported = tuple(reported)
        self.num_choices = num_choices
        self.metric = metric or self.names[0]
        self.num_columns = num_choices * len(self.names) + len(self.reported)
        self._choice: int | None = None
        self.add_state("users", default=[], dist_reduce_fx="cat")
        self.add_state("clients", default=[], dist_reduce_fx="cat")
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(
        self, users: Tensor, clients: Tensor, ranks: Tensor, rows: Tensor, reported: Tensor | None = None
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
        """
        of_choices = [ranking_metrics(ranks_T, rows, len(users), self.cutoffs) for ranks_T in torch.atleast_2d(ranks)]
        of_choices = of_choices if len(of_choices) == self.num_choices else of_choices * self.num_choices
        values = torch.stack([metrics[name] for metrics in of_choices for name in self.names], dim=1)
        evaluated = ~values.isnan().any(dim=1)
        if reported is None:
            reported = values.new_full((len(users), len(self.reported)), torch.nan)
        self.users.append(users.cpu()[evaluated].to(self.device))
        self.clients.append(clients.cpu()[evaluated].to(self.device))
        self.values.append(torch.cat([values, reported.to(values)], dim=1)[evaluated].to(self.device))

    def add(self, users: Tensor, clients: Tensor, values: Tensor) -> None:
        """Add what another process's `take` gave."""
        self.users.append(users.to(self.device))
        self.clients.append(clients.to(self.device))
        self.values.append(values.to(self.device))

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """Users ``[U]``, their clients ``[U]`` and values ``[U, G · M + R]`` so far, which are forgotten here."""
        none = torch.empty(0, dtype=torch.int64)
        taken = none, none, torch.empty(0, self.num_columns, dtype=torch.float64)
        if self.users:
            taken = torch.cat(list(self.users)), torch.cat(list(self.clients)), torch.cat(list(self.values))
        self.reset()
        return taken

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in torchmetrics; a process that had no users takes part with empty states of the right type and shape."""
        if not self.users:
            none = torch.empty(0, dtype=torch.int64, device=self.device)
            self.users, self.clients = [none], [none]
            self.values = [torch.empty(0, self.num_columns, dtype=torch.float64, device=self.device)]
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Any]:
        """Figures of all processes' users.

        Returns:
            ``users`` and ``client_of_user`` ``[U]`` int64, ascending by user; ``per_user`` and ``per_client``: metric
            name → ``[U]`` or ``[C]`` float64; ``pooled``: metric name → mean over users; ``reported``: name → ``[U]``
            float64; ``choice``: whose metrics these are. All on the CPU. Tensors with one element come back as
            scalars, as torchmetrics does with every result; `evaluation` undoes it.
        """
        users, client_of_user, values = self._sorted_by_user()
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
        evaluation = summarise(per_user, result["client_of_user"].reshape(-1), self.num_clients, stage, round_index)
        return replace(evaluation, reported=_vectors(result["reported"]), choice=int(result["choice"]))

    def _sorted_by_user(self) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(self.users, Tensor) and not self.users:
            none = torch.empty(0).long()
            return none, none, torch.empty(0, self.num_columns, dtype=torch.float64)
        users, clients, values = (dim_zero_cat(state).cpu() for state in (self.users, self.clients, self.values))
        first = torch.from_numpy(np.unique(users.numpy(), return_index=True)[1])
        return users[first], clients[first], values[first]


def _vectors(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: column.reshape(-1) for name, column in columns.items()}
