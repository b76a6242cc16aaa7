"""Ends a run that is told to stop where little is lost, so that it can be resumed later."""

from __future__ import annotations

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import RoundRecord, Trained
from fellrec.launch.preemption import StopSignals


class Preemption(FederatedCallback):
    """Ends a run that was told to stop after the client that trains, or after the round.

    It is the last callback: what the others write at the same point is on disk by then.

    Args:
        signals: Entered by the command.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_client_end(self, trained: Trained) -> None:
        """Stop after a client."""
        self.signals.stop_at(f"after client {trained.job.client} of round {trained.job.round_index}")

    def on_round_end(self, record: RoundRecord) -> None:
        """Stop after a round."""
        self.signals.stop_at(f"after round {record.round_index}")
