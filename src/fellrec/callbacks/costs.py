"""Adds up what the rounds cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.ledger import Ledger
from fellrec.federated.records import Aggregated, FitResult, FitStart, RoundRecord, Trained
from fellrec.report.costs import Rounds, RunCost, Storage


class CostMeter(FederatedCallback):
    """Keeps the rounds' figures, also those before a resume; when the run is over, ``cost`` is what it cost.

    A round in which the run was interrupted is not measured: some of its clients were trained before.

    Args:
        transport: ``split.transport``.
        storage: Counts what both sides hold; called once, when the run begins.
        ledger: Of the run.

    Attributes:
        cost: The cost of the run; ``None`` until it is over.
        rounds: Figures of the rounds so far.
        total_seconds: Wall seconds of the run so far, evaluation included.
    """

    def __init__(self, transport: str, storage: Callable[[], Storage], ledger: Ledger) -> None:
        self.transport = transport
        self.cost: RunCost | None = None
        self.rounds = Rounds()
        self._ledger = ledger
        self._count = storage
        self._begun = time.perf_counter()
        self._started = self._cpu_seconds = 0.0
        self._num_trained = 0

    @property
    def total_seconds(self) -> float:
        """See the class."""
        return time.perf_counter() - self._begun

    @property
    def seconds_per_round(self) -> float | None:
        """Mean wall seconds of a round without evaluation; ``None`` if none was measured."""
        return self.rounds.seconds / self.rounds.num_rounds if self.rounds.num_rounds else None

    def on_fit_start(self, fit: FitStart) -> None:
        """Count what is stored before anything is trained."""
        self._storage = self._count()

    def on_round_start(self, round_index: int) -> None:
        """Read the processor's clock."""
        self._started, self._num_trained = time.process_time(), 0

    def on_client_end(self, trained: Trained) -> None:
        """Count the clients that are trained now."""
        self._num_trained += 1

    def on_aggregate_end(self, aggregated: Aggregated) -> None:
        """Read it again: training and aggregation are over, evaluation does not count."""
        self._cpu_seconds = time.process_time() - self._started

    def on_round_end(self, record: RoundRecord) -> None:
        """Add the round."""
        if self._num_trained == len(record.trained):
            self.rounds = self.rounds.plus(record, self._cpu_seconds)

    def on_fit_end(self, result: FitResult) -> None:
        """Sum up; what is scored after the run does not belong to it."""
        self.cost = RunCost.collect(self._storage, self.rounds, self._ledger.rows(), self.transport)

    def state_dict(self) -> dict[str, Any]:
        """The figures so far."""
        return {**asdict(self.rounds), "total_seconds": self.total_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the figures of the rounds before a resume."""
        self._begun -= state["total_seconds"]
        seconds = tuple(state["round_seconds"]), tuple(state["cpu_seconds"])
        self.rounds = Rounds(*seconds, state["sums"], state["peaks"])
