"""Where clients train and are evaluated: one after the other in this process, or elsewhere."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Protocol

from fellrec.errors import SplitError, TrainingError
from fellrec.federated.callback import Events
from fellrec.federated.evaluator import Evaluator
from fellrec.federated.local import LocalTrainer, OnStep
from fellrec.federated.records import Failed, Job, LossJob, ScoreJob, Trained
from fellrec.types import Evaluation

_log = logging.getLogger(__name__)


class Executor(Protocol):
    """Carries out jobs; results do not depend on how."""

    def train(self, jobs: Sequence[Job], events: Events) -> Iterator[Trained | Failed]:
        """Train; results come in any order, as they are finished.

        Args:
            jobs: What to train.
            events: Told of the start of each client and of each of its steps.
        """

    def measure(self, jobs: Sequence[LossJob]) -> list[tuple[float, ...]]:
        """Measure losses.

        Args:
            jobs: Clients and the adapters that they measure.

        Returns:
            For each job, in their order, the loss of each of its adapters; NaN for a client that failed.
        """

    def score(self, jobs: Sequence[ScoreJob], stage: str, round_index: int) -> Evaluation:
        """Rank all items for the users of all jobs.

        Args:
            jobs: Adapters and the clients that they serve.
            stage: ``"val"`` or ``"test"``.
            round_index: The round that the adapters come from.
        """

    def close(self) -> None:
        """The command is over; other processes may end."""


class SerialExecutor:
    """One client after the other, in this process.

    Args:
        trainer: Local training.
        evaluator: Ranking of users.
    """

    def __init__(self, trainer: LocalTrainer, evaluator: Evaluator) -> None:
        self.trainer = trainer
        self.evaluator = evaluator

    def train(self, jobs: Sequence[Job], events: Events) -> Iterator[Trained | Failed]:
        """See ``Executor``; in the order of the jobs."""
        for job in jobs:
            events.client_starts(job)
            yield self.train_one(job, lambda loss: events.call("on_step_end", loss))

    def train_one(self, job: Job, on_step: OnStep) -> Trained | Failed:
        """Train one client here."""
        try:
            return self.trainer.train(job, on_step)
        except SplitError:
            raise
        except TrainingError as error:
            _log.debug("a client's training failed", exc_info=error)
            return Failed(job, str(error))

    def measure(self, jobs: Sequence[LossJob]) -> list[tuple[float, ...]]:
        """See ``Executor``."""
        return [self.measure_one(job) for job in jobs]

    def measure_one(self, job: LossJob) -> tuple[float, ...]:
        """Let one client measure here."""
        try:
            return self.trainer.measure(job)
        except SplitError:
            raise
        except TrainingError as error:
            _log.warning("losses of client %d are unknown: %s", job.client, error)
            return (math.nan,) * len(job.adapters)

    def score(self, jobs: Sequence[ScoreJob], stage: str, round_index: int) -> Evaluation:
        """See ``Executor``."""
        return self.evaluator.evaluate(jobs, stage, round_index, self.score_stage)

    def score_stage(self, jobs: Sequence[ScoreJob], stage: str, round_index: int) -> None:
        """Add the metrics of the users of all jobs; jobs with the same adapter follow each other."""
        first = {id(job.adapter): place for place, job in reversed(list(enumerate(jobs)))}
        before = None
        for job in sorted(jobs, key=lambda job: first[id(job.adapter)]):
            is_new, before = job.adapter is not before, job.adapter
            self.evaluator.score(job, stage, round_index, is_new=is_new)

    def close(self) -> None:
        """Nothing to do: all work is in this process."""
