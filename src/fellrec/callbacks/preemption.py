"""Lets a run that is told to stop end where little is lost, so that it can be resumed later."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fellrec.federated.callback import FederatedCallback
from fellrec.launch.preemption import StopSignals
from fellrec.types import ClientUpdate, RoundRecord

if TYPE_CHECKING:
    from fellrec.federated.loop import FederatedLoop


class Preemption(FederatedCallback):
    """Ends a run that was told to stop after the client that trains, or after the round.

    It must be the last callback: what the others write at the same point is on the disk by then.

    Args:
        signals: Entered by the command.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals

    def on_client_end(self, loop: FederatedLoop, update: ClientUpdate) -> None:
        """Stop after a client."""
        self.signals.stop_at(f"after client {update.client} of round {loop.state.round_index}")

    def on_round_end(self, loop: FederatedLoop, record: RoundRecord) -> None:
        """Stop after a round."""
        self.signals.stop_at(f"after round {record.round_index}")
