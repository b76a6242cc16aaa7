"""Where clients train and are evaluated: one after the other in this process, or elsewhere."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Protocol

from fellrec.errors import SplitError, TrainingError
from fellrec.federated.callback import Events
from fellrec.federated.evaluator import Evaluator
from fellrec.federated.joint import JointTrainer, OnClientStep
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
    """One client, or one group of clients, after the other, in this process.

    Args:
        trainer: Local training.
        evaluator: Ranking of users.
        joint: Local training of several clients at once; ``None`` for one after the other.
    """

    def __init__(self, trainer: LocalTrainer, evaluator: Evaluator, joint: JointTrainer | None = None) -> None:
        self.trainer = trainer
        self.evaluator = evaluator
        self.joint = joint

    def train(self, jobs: Sequence[Job], events: Events) -> Iterator[Trained | Failed]:
        """See ``Executor``; in the order of the jobs, or of `groups`."""
        for group in self.groups(jobs):
            for job in group:
                events.client_starts(job)
            yield from self.train_group(group, lambda job, loss: events.call("on_step_end", loss))

    def groups(self, jobs: Sequence[Job], num_processes: int = 1) -> list[list[Job]]:
        """Jobs that are done at once, each alone without ``joint``; see ``JointTrainer.groups``."""
        return [[job] for job in jobs] if self.joint is None else self.joint.groups(jobs, num_processes)

    def train_group(self, jobs: Sequence[Job], on_step: OnClientStep) -> list[Trained | Failed]:
        """Train the clients of a group here."""
        if self.joint is not None and len(jobs) > 1:
            return self.joint.train(jobs, on_step)
        return [self.train_one(job, partial(on_step, job)) for job in jobs]

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
