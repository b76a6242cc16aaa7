"""Keeps a run resumable: clients' files as they finish, a manifest after every so many rounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.checkpoint import CHECKPOINTS, CheckpointFolder, Persisted
from fellrec.federated.population import Population
from fellrec.federated.records import FitResult, FitStart, RoundRecord
from fellrec.functional.ranges import Count


class Checkpoint(FederatedCallback):
    """Writes ``checkpoints`` in the run directory; ``fellrec train resume=RUN_DIR`` continues from there.

    Every client's adapter and optimiser state are in files before any callback is called at its end, so stopping a run
    loses at most the client that was being trained; a loss of power may lose those of the round. The manifest is
    written at the end of a round. What must happen before a round counts as done (logging) comes before this callback
    in the list.

    Args:
        run_dir: The run's directory.
        parts: The parts of the run with state, by name; see ``Persisted``.
        population: The population among them.
        every: Rounds between two manifests.
        keep: Manifests that stay on disk.
        cohort_size: Rows that train in a round, to estimate the disk space.
    """

    def __init__(
        self,
        run_dir: Path,
        parts: Mapping[str, Persisted],
        population: Population,
        every: Count = 1,
        keep: Count = 2,
        cohort_size: int | None = None,
    ) -> None:
        self.checkpoints = CheckpointFolder(run_dir / CHECKPOINTS, keep)
        self.parts = parts
        self.population = population
        self.every = every
        self.cohort_size = cohort_size
        self._saved: int | None = None
        self._has_validated = False

    def resume(self) -> int:
        """Let the parts continue from the newest checkpoint that is whole; gives the rounds that were done.

        Raises:
            TrainingError: If there is none.
            CheckpointError: If all are damaged.
        """
        self._saved = self.checkpoints.load(self.parts)
        self._has_validated = bool(getattr(self.parts.get("selection"), "is_started", True))
        return self._saved

    def on_fit_start(self, fit: FitStart) -> None:
        """Let adapters be files from now on; write the start, so that whatever is trained can be resumed."""
        self.population.persist(self.checkpoints.tensors, self.cohort_size, fit.num_rounds)
        if self._saved is None:
            self._save(fit.round_index)

    def on_round_start(self, round_index: int) -> None:
        """Before the first round, write the start with its validation, unless clients may have finished already."""
        if round_index == 0 and not self._has_validated:
            self._save(0)

    def on_round_end(self, record: RoundRecord) -> None:
        """Write the checkpoint."""
        done = record.round_index + 1
        if done % self.every == 0 or record.is_last:
            self._save(done)

    def on_fit_end(self, result: FitResult) -> None:
        """Write the last round, if a callback ended the run after it."""
        if self._saved != result.num_rounds:
            self._save(result.num_rounds)

    def _save(self, round_index: int) -> None:
        self.checkpoints.save(self.parts, round_index)
        self._saved = round_index
