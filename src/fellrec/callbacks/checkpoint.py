"""Keeps a run resumable: a checkpoint after every so many rounds, the adapters in a portable format at the end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fellrec.federated.hooks import FederatedCallback
from fellrec.types import RoundRecord

if TYPE_CHECKING:
    from fellrec.federated.loop import FederatedLoop


class Checkpoint(FederatedCallback):
    """Writes ``checkpoints/round_<n>`` in the run directory between rounds, never in the middle of one.

    Stopping a run in a round loses that round only; ``fellrec train resume=RUN_DIR`` goes on from the last one.

    Args:
        run_dir: The run's directory.
        every: Rounds between two checkpoints.
    """

    def __init__(self, run_dir: Path, every: int = 1) -> None:
        self.run_dir = run_dir
        self.every = every

    def on_round_end(self, loop: FederatedLoop, record: RoundRecord) -> None:
        """Write the checkpoint."""
        done = record.round_index + 1
        if done % self.every == 0 or done == loop.settings.num_rounds or loop.out_of_patience:
            loop.state.extras["aggregation"] = loop.aggregation.state_dict()
            loop.state.extras["ledger"] = loop.execution.ledger.rows()
            loop.execution.save(loop, self.run_dir)
