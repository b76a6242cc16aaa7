"""Keeps a run resumable: clients' files as they finish, a manifest after every so many rounds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.executor import CHECKPOINTS
from fellrec.types import RoundRecord

if TYPE_CHECKING:
    from fellrec.federated.loop import FederatedLoop


class Checkpoint(FederatedCallback):
    """Writes ``checkpoints`` in the run directory; ``fellrec train resume=RUN_DIR`` goes on from there.

    Every client's adapter and optimiser state are on the disk before any callback hears of its end, so stopping a run
    loses at most the client that was being trained. The manifest is written at the end of a round. What must happen
    before a round counts as done (logging) stands before this callback, what may end the run after it.

    Args:
        run_dir: The run's directory.
        every: Rounds between two manifests.
    """

    def __init__(self, run_dir: Path, every: int = 1) -> None:
        self.run_dir = run_dir
        self.every = every
        self._is_new = True
        self._is_validated = False

    @property
    def folder(self) -> Path:
        """Where the checkpoints lie."""
        return self.run_dir / CHECKPOINTS

    def resume(self, loop: FederatedLoop) -> None:
        """Let a fresh loop go on from the newest checkpoint that is whole.

        Raises:
            TrainingError: If there is none.
            CheckpointError: If all are damaged.
        """
        loop.execution.load(loop, self.run_dir)
        loop.execution.ledger.reopen(self.folder, loop.state.round_index)
        loop.aggregation.load_state_dict(loop.state.extras.get("aggregation", {}))
        self._is_new = False
        self._is_validated = bool(loop.state.selection.client_values)

    def on_fit_start(self, loop: FederatedLoop) -> None:
        """Let adapters live in files from now on; write the start, so that nothing is lost that is worth a resume."""
        loop.execution.keep_on_disk(loop, self.run_dir)
        if self._is_new:
            self._save(loop)

    def on_round_start(self, loop: FederatedLoop, round_index: int) -> None:
        """Write what the first round begins with: the start, now validated."""
        if round_index == 0 and not self._is_validated:  # else it is there, and clients may be that have finished
            self._save(loop)

    def on_round_end(self, loop: FederatedLoop, record: RoundRecord) -> None:
        """Write the checkpoint."""
        done = record.round_index + 1
        if done % self.every == 0 or done == loop.settings.num_rounds or loop.out_of_patience:
            self._save(loop)

    def _save(self, loop: FederatedLoop) -> None:
        loop.state.extras["aggregation"] = loop.aggregation.state_dict()
        loop.execution.ledger.archive(self.folder, loop.state.round_index)
        loop.execution.save(loop, self.run_dir)
