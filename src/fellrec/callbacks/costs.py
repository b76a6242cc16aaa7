"""Adds up what the rounds cost."""

from __future__ import annotations

import time
from collections.abc import Callable

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.ledger import Ledger
from fellrec.federated.records import Aggregated, FitResult, FitStart, RoundRecord
from fellrec.report.costs import Rounds, RunCost, Storage


class CostMeter(FederatedCallback):
    """Keeps the rounds' figures; when the run is over, ``cost`` is what it cost.

    Args:
        transport: ``split.transport``.
        storage: Counts what both sides hold; called once, when the run begins.
        ledger: Of the run.

    Attributes:
        cost: The cost of the run; ``None`` until it is over.
        rounds: Figures of the rounds so far.
    """

    def __init__(self, transport: str, storage: Callable[[], Storage], ledger: Ledger) -> None:
        self.transport = transport
        self.cost: RunCost | None = None
        self.rounds = Rounds()
        self._ledger = ledger
        self._count = storage
        self._begun = time.perf_counter()
        self._started = self._cpu_seconds = 0.0

    @property
    def total_seconds(self) -> float:
        """Wall seconds since this object was made, evaluation included."""
        return time.perf_counter() - self._begun

    def on_fit_start(self, fit: FitStart) -> None:
        """Count what is stored before anything is trained."""
        self._storage = self._count()

    def on_round_start(self, round_index: int) -> None:
        """Read the processor's clock."""
        self._started = time.process_time()

    def on_aggregate_end(self, aggregated: Aggregated) -> None:
        """Read it again: training and aggregation are over, evaluation does not count."""
        self._cpu_seconds = time.process_time() - self._started

    def on_round_end(self, record: RoundRecord) -> None:
        """Add the round."""
        self.rounds = self.rounds.plus(record, self._cpu_seconds)

    def on_fit_end(self, result: FitResult) -> None:
        """Sum up; what is scored after the run does not belong to it."""
        self.cost = RunCost.collect(self._storage, self.rounds, self._ledger.rows(), self.transport)
