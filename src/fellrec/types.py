"""The frozen records and aliases that travel between packages.

Shape letters used in names and comments: C clients, N clients of a cohort, U users, I items, B rows of a batch,
L tokens, T targets, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fellrec.errors import TrainingError
from fellrec.functional.first_items import FirstItems
from fellrec.functional.stacks import AdapterStack, as_lazy

Adapter = Mapping[str, Tensor]
"""One client's adapter: parameter name → tensor of the parameter's own shape."""


@dataclass(frozen=True)
class ClientUpdate:
    """What one client hands back after local training, beside its adapter (which stays in the bank).

    Attributes:
        client: Index of the client in the population, from 0.
        num_samples: Training targets the client holds.
        num_steps: Optimiser steps taken this round.
        loss: Sample-weighted mean loss over this round's local training, METHOD (2).
        seconds: Wall seconds of local training.
    """

    client: int
    num_samples: int
    num_steps: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class Updates:
    """All updates of one round, as the aggregation sees them; row ``n`` belongs to ``clients[n]``.

    Attributes:
        clients: Indices of the cohort in the population, ascending, ``N`` of them.
        start: Adapters that the clients started the round with, name → ``[N, *shape]``.
        end: Adapters after local training, name → ``[N, *shape]``.
        losses: ``[N]`` float64, the local losses of METHOD (2).
        num_samples: ``[N]`` float64, training targets per client.
    """

    clients: tuple[int, ...]
    start: AdapterStack
    end: AdapterStack
    losses: Tensor
    num_samples: Tensor

    def check_finite(self, round_index: int) -> None:
        """Refuse adapters with infinite or undefined entries.

        Raises:
            TrainingError: Naming the parameter, the client and the round.
        """
        end = as_lazy(self.end)
        for name in end:
            finite = torch.ones(end.num_rows, dtype=torch.bool)
            for _, block in end.blocks(name):
                finite &= block.isfinite().all(dim=1).cpu()
            if not bool(finite.all()):
                client = self.clients[int(finite.logical_not().nonzero()[0])]
                raise TrainingError(
                    f"{name} of client {client} is not finite after local training in round {round_index}; "
                    "lower trainer.learning_rate"
                )


@dataclass(frozen=True)
class Aggregated:
    """What an aggregation returns.

    Attributes:
        adapters: Next adapters, name → ``[N, *shape]``, rows as in ``Updates.clients``. What callbacks get may be read
            from files when it is asked for; take what you need before the round ends.
        matrices: Square ``[N, N]`` matrices worth looking at (``mixing``, ``similarity``), by name.
        per_client: ``[N]`` vectors worth logging (``learning_speed``, …), by name.
    """

    adapters: AdapterStack
    matrices: Mapping[str, Tensor] = field(default_factory=dict)
    per_client: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one evaluation of all clients on one holdout.

    Attributes:
        stage: ``"val"`` or ``"test"``.
        round_index: Round after which the evaluation ran; -1 is before the first round.
        per_user: Metric name → ``[U_eval]`` float64, one value per evaluated user.
        client_of_user: ``[U_eval]`` int64, the client of each evaluated user.
        per_client: Metric name → ``[C]`` float64, mean over the client's users.
        summary: Flat MLflow-safe names without the stage, such as ``ndcg_at_10/mean``, ``ndcg_at_10/pooled``,
            ``ndcg_at_10/variance``, ``ndcg_at_10/worst``; and what the ranker says of itself, such as
            ``generation/in_catalogue_rate``.
        users: ``[U_eval]`` int64 index of each evaluated user, ascending.
        first_items: Their first items, as far as the largest cutoff; ``None`` where rankings are not kept.
        reported: What the ranker told of each user, name → ``[U_eval]`` float64.
        choice: Which of the ranker's choices these are the metrics of, from 0; see ``ReportingRanker``.
    """

    stage: str
    round_index: int
    per_user: Mapping[str, Tensor]
    client_of_user: Tensor
    per_client: Mapping[str, Tensor]
    summary: Mapping[str, float]
    users: Tensor
    first_items: FirstItems | None = None
    reported: Mapping[str, Tensor] = field(default_factory=dict)
    choice: int = 0


@dataclass(frozen=True)
class RoundRecord:
    """Everything one finished round reports to the callbacks.

    Attributes:
        round_index: From 0.
        updates: One record per client of the cohort.
        aggregated: Result of the aggregation.
        evaluation: Validation after the aggregation, or ``None`` if this round was not evaluated.
        seconds: Wall seconds of training and aggregation, evaluation left out.
        costs: What crossed between client and server, and how busy the server was; MLflow-safe names.
        dropped: Clients of the cohort that did not finish the round.
    """

    round_index: int
    updates: tuple[ClientUpdate, ...]
    aggregated: Aggregated
    evaluation: Evaluation | None
    seconds: float
    costs: Mapping[str, float] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()
