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
        initial: The adapter that all clients started with.
        round_index: The next round to run, from 0.
        optimizers: Each client's optimiser state, kept across rounds.
        local_steps: Optimiser steps each client has taken in all rounds.
        rounds_without_gain: Evaluations since the best one, for early stopping.
        extras: State of the aggregation and of callbacks, by name; plain JSON values.
    """

    bank: AdapterBank
    selection: Selection
    initial: AdapterBank
    round_index: int = 0
    optimizers: dict[int, OptimizerState] = field(default_factory=dict)
    local_steps: list[int] = field(default_factory=list)
    rounds_without_gain: int = 0
    extras: dict[str, Any] = field(default_factory=dict)

    def take_optimizer(self, client: int, reset: bool = False) -> OptimizerState:
        """Hand out a client's optimiser state; an empty one the first time, or if it is to be reset."""
        known = self.optimizers.pop(client, defaultdict(dict))
        return defaultdict(dict) if reset else known

    def bank_named(self, name: str) -> AdapterBank:
        """``"initial"``, ``"current"``, ``"best"`` (of the population) or ``"best_per_client"``.

        Raises:
            KeyError: For another name.
        """
        banks = {"current": self.bank, "best": self.selection.bank, "best_per_client": self.selection.client_bank}
        return {**banks, "initial": self.initial}[name]

    def keep_best(self, population: bool, clients: tuple[int, ...], rows: tuple[int, ...]) -> None:
        """Remember the current adapters as the best.

        Args:
            population: Whether as the population's.
            clients: Those for which they are the best on their own.
            rows: The row of ``bank`` that serves each of them.
        """
        if clients:
            self.selection.client_bank.replace(clients, self.bank.stack(rows))
        if population:
            everybody = tuple(range(len(self.bank)))
            self.selection.bank.replace(everybody, self.bank.stack(everybody))

    def select(self, evaluation: Evaluation, row_of_client: tuple[int, ...]) -> tuple[bool, tuple[int, ...]]:
        """Compare an evaluation with the best so far and keep its adapters if they are better.

        Args:
            evaluation: Validation of all clients with ``bank`` as it is.
            row_of_client: The row of ``bank`` that serves each client.

        Returns:
            Whether the population's mean improved, and the clients who did.
        """
        selection = self.selection
        values = evaluation.per_client[selection.metric].tolist()
        if not selection.client_values:
            selection.client_values = [-float("inf")] * len(values)
            selection.client_rounds = [-1] * len(values)
        better = tuple(c for c, value in enumerate(values) if value > selection.client_values[c])
        for client in better:
            selection.client_values[client], selection.client_rounds[client] = values[client], evaluation.round_index
        mean = evaluation.summary[f"{selection.metric}/mean"]
        is_best = mean > selection.value
        self.rounds_without_gain = 0 if is_best else self.rounds_without_gain + 1
        if is_best:
            selection.value, selection.round_index = mean, evaluation.round_index
        self.keep_best(is_best, better, tuple(row_of_client[client] for client in better))
        return is_best, better
