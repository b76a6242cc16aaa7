"""Adds up what the rounds cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fellrec.federated.callback import FederatedCallback
from fellrec.report.costs import Rounds, RunCost, Storage
from fellrec.types import Aggregated, RoundRecord

if TYPE_CHECKING:
    from fellrec.federated.loop import FederatedLoop


class CostMeter(FederatedCallback):
    """Keeps the rounds' figures; when the run is over, ``cost`` is what it cost.

    Args:
        transport: ``split.transport``.
        storage: Counts what both sides hold; called once, when the run begins.
    """

    def __init__(self, transport: str, storage: Callable[[], Storage]) -> None:
        self.transport = transport
        self.cost: RunCost | None = None
        self.rounds = Rounds()
        self._count = storage
        self._started = self._cpu_seconds = 0.0

    def on_fit_start(self, loop: FederatedLoop) -> None:
        """Count what is stored before anything is trained."""
        self._storage = self._count()

    def on_round_start(self, loop: FederatedLoop, round_index: int) -> None:
        """Read the processor's clock."""
        self._started = time.process_time()

    def on_aggregate_end(self, loop: FederatedLoop, aggregated: Aggregated) -> None:
        """Read it again: training and aggregation are over, evaluation does not count."""
        self._cpu_seconds = time.process_time() - self._started

    def on_round_end(self, loop: FederatedLoop, record: RoundRecord) -> None:
        """Add the round."""
        self.rounds = self.rounds.plus(record, self._cpu_seconds)

    def on_fit_end(self, loop: FederatedLoop) -> None:
        """Close the books: what is scored after the run is not the run's."""
        self.cost = RunCost.collect(self._storage, self.rounds, loop.execution.ledger.rows(), self.transport)
