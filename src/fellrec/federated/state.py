"""Everything a run needs to go on: adapters, optimiser states, position, and the best round so far."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from fellrec.models.bank import AdapterBank
from fellrec.types import Evaluation

OptimizerState = dict[torch.Tensor, dict[str, Any]]


@dataclass
class Selection:
    """The best adapters so far on the validation holdout, which is all that selection ever sees.

    Attributes:
        metric: Metric name, higher is better.
        bank: Adapters of the best round of the whole population.
        value: Mean over clients in that round.
        round_index: That round; -1 is the start, before any training.
        client_values: Best value of each client on its own, client → value.
        client_rounds: The round of that value, client → round.
        client_bank: Each client's adapter of its own best round.
    """

    metric: str
    bank: AdapterBank
    client_bank: AdapterBank
    value: float = -float("inf")
    round_index: int = -1
    client_values: list[float] = field(default_factory=list)
    client_rounds: list[int] = field(default_factory=list)


@dataclass
class RunState:
    """State of a federated run between two rounds.

    Attributes:
        bank: Every client's adapter now.
        selection: The best adapters so far.
        round_index: The next round to run, from 0.
        optimizers: Each client's optimiser state, kept across rounds.
        local_steps: Optimiser steps each client has taken in all rounds.
        rounds_without_gain: Evaluations since the best one, for early stopping.
        extras: State of the aggregation and of callbacks, by name; plain JSON values.
    """

    bank: AdapterBank
    selection: Selection
    round_index: int = 0
    optimizers: dict[int, OptimizerState] = field(default_factory=dict)
    local_steps: list[int] = field(default_factory=list)
    rounds_without_gain: int = 0
    extras: dict[str, Any] = field(default_factory=dict)

    def take_optimizer(self, client: int) -> OptimizerState:
        """Hand out a client's optimiser state, an empty one the first time."""
        return self.optimizers.pop(client, defaultdict(dict))

    def select(self, evaluation: Evaluation, row_of_client: tuple[int, ...]) -> bool:
        """Compare an evaluation with the best so far and keep its adapters if they are better.

        Args:
            evaluation: Validation of all clients with ``bank`` as it is.
            row_of_client: The row of ``bank`` that serves each client.

        Returns:
            Whether the population's mean improved.
        """
        selection = self.selection
        values = evaluation.per_client[selection.metric].tolist()
        if not selection.client_values:
            selection.client_values = [-float("inf")] * len(values)
            selection.client_rounds = [-1] * len(values)
        for client, value in enumerate(values):
            if value > selection.client_values[client]:
                selection.client_values[client], selection.client_rounds[client] = value, evaluation.round_index
                selection.client_bank.replace((client,), self.bank.stack((row_of_client[client],)))
        mean = evaluation.summary[f"{selection.metric}/mean"]
        if not mean > selection.value:
            self.rounds_without_gain += 1
            return False
        selection.value, selection.round_index = mean, evaluation.round_index
        selection.bank.replace(tuple(range(len(self.bank))), self.bank.stack(tuple(range(len(self.bank)))))
        self.rounds_without_gain = 0
        return True
