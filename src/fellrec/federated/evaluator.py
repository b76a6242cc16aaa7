"""Ranking of clients' users with an adapter, and the evaluation that it adds up to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning import Fabric

from fellrec.data.datamodule import FellrecDataModule
from fellrec.federated.client_model import ClientModel
from fellrec.federated.kept import KeptUsers, one_job_per_adapter
from fellrec.federated.records import ScoreJob
from fellrec.models.module import FellrecModule
from fellrec.types import Evaluation

_log = logging.getLogger(__name__)

_LONG_SECONDS = 120.0
"""The user is told before an evaluation that takes longer."""


class Evaluator:
    """Ranks all items for the users of clients.

    Args:
        fabric: Device and precision.
        module: The recommender, with ranker and metrics.
        datamodule: Users by client.
        model: Puts adapters into the module.
        kept: Metrics of earlier evaluations, also of other runs with the same module.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: FellrecModule,
        datamodule: FellrecDataModule,
        model: ClientModel,
        kept: KeptUsers | None = None,
    ) -> None:
        self.fabric = fabric
        self.module = module
        self.datamodule = datamodule
        self.model = model
        self.kept = kept or KeptUsers()
        self.on_users_scored: Callable[[int, int], None] = lambda done, total: None
        """Called after every batch, with the users that are ranked and those that will be."""
        self._num_ranked = self._num_to_rank = 0
        self._num_to_estimate: int | None = 0

    def evaluate(
        self,
        jobs: Sequence[ScoreJob],
        stage: str,
        round_index: int,
        score: Callable[[Sequence[ScoreJob], str, int], None],
    ) -> Evaluation:
        """Evaluate the users of all jobs; before a test, validation chooses a ranker's open setting.

        Users of clients with the same adapter are batched together, and those that were ranked with it before keep
        their metrics. Through an executed cut each client is evaluated by itself, and what crosses the cut is recorded.

        Args:
            jobs: Adapters and the clients that they serve.
            stage: ``"val"`` or ``"test"``.
            round_index: The round that the adapters come from.
            score: Adds the metrics of the users of some jobs to ``module.metrics``.
        """
        evaluation = None
        for needed in ("val", "test") if stage == "test" and self.module.chooses_on_validation else (stage,):
            left = list(jobs) if self.module.model.is_cut else self._left(jobs, needed, round_index)
            if self._num_to_estimate == 0:
                self._num_to_estimate = sum(self.datamodule.num_users(needed, job.clients) for job in left)
            self._num_ranked, self._num_to_rank = 0, sum(self.datamodule.num_users(needed, job.clients) for job in left)
            score(left, needed, round_index)
            if not self.module.model.is_cut:
                self._keep(left, needed)
            evaluation = self.module.finish_evaluation(needed, round_index)
        assert evaluation is not None
        return evaluation

    def _left(self, jobs: Sequence[ScoreJob], stage: str, round_index: int) -> list[ScoreJob]:
        """What is to be scored, one job for each adapter; the kept metrics of all other users are added."""
        if round_index < 0:
            self.kept.begin(jobs)
        left = []
        for job in one_job_per_adapter(jobs):
            known: frozenset[int] = frozenset()
            if (kept := self.kept.of(job, stage)) is not None:
                self.module.add_users(kept.users)
                known = kept.clients
            rest = tuple(client for client in job.clients if client not in known)
            if self.datamodule.num_users(stage, rest):
                left.append(replace(job, clients=rest))
        return left

    def _keep(self, scored: Sequence[ScoreJob], stage: str) -> None:
        users = self.module.take_users()
        for job in scored:
            self.kept.add(job, stage, users)
        self.module.add_users(users)

    def score(
        self, job: ScoreJob, stage: str, round_index: int, part: int = 0, num_parts: int = 1, is_new: bool = True
    ) -> None:
        """Add the metrics of a job's users to ``module.metrics``.

        Args:
            job: Adapter and clients.
            stage: ``"val"`` or ``"test"``.
            round_index: The round that the adapter comes from.
            part: Which of ``num_parts`` parts; batches are dealt out and never divided, so no figure changes.
            num_parts: Processes among which the job is divided.
            is_new: Whether the adapter is another one than at the last call.
        """
        self.module.eval()
        with self.model.evaluating(job, stage, round_index), self.fabric.autocast():
            if is_new:
                self.module.ranker.refresh(self.module.model)
            if self._num_to_estimate:
                self._estimate(job, stage, self._num_to_estimate)
                self._num_to_estimate = None
            for number, batch in enumerate(self.datamodule.eval_loader(stage, job.clients)):
                if number % num_parts == part:
                    self.module.score_batch(self.fabric.to_device(batch), keep_rankings=stage == "test")
                    # The other processes of the job are about as far.
                    self._num_ranked = min(self._num_to_rank, self._num_ranked + num_parts * len(batch["users"]))
                    self.on_users_scored(self._num_ranked, self._num_to_rank)

    def _estimate(self, job: ScoreJob, stage: str, num_users: int) -> None:
        """Say how long an evaluation takes if it takes long, from the time of one user and of eight."""
        if self.module.model.is_cut:  # what crosses the cut is counted
            return
        histories = next(iter(self.datamodule.eval_loader(stage, job.clients)))["histories"]
        for some in (1, 8):
            users = self.fabric.to_device(histories[:some])
            started = time.perf_counter()
            self.module.ranker.scores(self.module.model, users).sum().item()
            seconds = (time.perf_counter() - started) / len(users) * num_users / self.fabric.world_size
            if seconds < _LONG_SECONDS:
                return
        _log.warning(
            "ranking %d users takes up to %.0f minutes with %s, in every evaluation: choose another ranker, or "
            "evaluate less often with trainer.evaluate_every",
            num_users,
            seconds / 60,
            type(self.module.ranker).__name__,
        )
