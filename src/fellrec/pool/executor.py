"""Clients over processes: every process has the model, and trains and evaluates the clients that are placed on it.

Results do not depend on which process does what: a client's training is a function of its job and the seed of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from fellrec.distributed.memory import peak_bytes
from fellrec.distributed.message import Message, reading
from fellrec.errors import SplitError
from fellrec.federated.callback import Events
from fellrec.federated.executor import SerialExecutor
from fellrec.federated.ledger import Ledger
from fellrec.federated.records import SCALARS, Failed, Job, LossJob, ScoreJob, Trained, of_jobs
from fellrec.functional.placement import estimate_seconds
from fellrec.pool.messages import (
    ClientFailed,
    ClientsTrained,
    ClientTrained,
    LossesMeasured,
    MeasureLosses,
    ScoreClients,
    Scored,
    TrainClient,
    TrainClients,
)
from fellrec.pool.pool import Pool, Task
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import Evaluation


class PoolExecutor:
    """Trains and evaluates on all processes of a pool, the longest task first.

    Args:
        pool: The processes.
        local: Carries out this process's own tasks.
        ledger: Of the run; workers' records are added.
    """

    def __init__(self, pool: Pool, local: SerialExecutor, ledger: Ledger) -> None:
        self.pool = pool
        self.local = local
        self.ledger = ledger
        self._seconds: dict[int, float] = {}
        self._sent_changes: dict[int, int] = {}
        self._busy_seconds = 0.0
        self._peak_bytes = 0

    def train(self, jobs: Sequence[Job], events: Events) -> Iterator[Trained | Failed]:
        """See ``Executor``."""
        steps = {job.row: self.local.trainer.num_steps(job.data_of) for job in jobs}
        seconds = estimate_seconds([job.row for job in jobs], steps, self._seconds)
        of_row = {job.row: cost for job, cost in zip(jobs, seconds, strict=True)}
        groups = self.local.groups(jobs, len(self.pool.groups))
        costs = [sum(of_row[job.row] for job in group) for group in groups]
        self._busy_seconds = 0.0
        for outcomes in self.pool.run([self._training(group, events) for group in groups], costs, together=True):
            for outcome in outcomes:
                if isinstance(outcome, Trained):
                    self._seconds[outcome.row] = outcome.seconds
                    self._busy_seconds += outcome.seconds
                    self._peak_bytes = max(self._peak_bytes, outcome.peak_bytes)
                yield outcome

    def measure(self, jobs: Sequence[LossJob]) -> list[tuple[float, ...]]:
        """See ``Executor``."""
        costs = [float(self.local.trainer.num_steps(job.data_of) * len(job.adapters)) for job in jobs]
        found: dict[int, tuple[float, ...]] = dict(self.pool.run([self._measuring(job) for job in jobs], costs))
        return [found[job.row] for job in jobs]

    def score(self, jobs: Sequence[ScoreJob], stage: str, round_index: int) -> Evaluation:
        """See ``Executor``; if there are more processes than jobs, several divide a job's users."""
        return self.local.evaluator.evaluate(jobs, stage, round_index, self._score_stage)

    def close(self) -> None:
        """See ``Executor``."""
        self.pool.close()

    def costs(self, seconds: float) -> Mapping[str, float]:
        """How busy the processes were in a round that took so many seconds, and the largest memory of one."""
        available = len(self.pool.groups) * seconds
        return {
            "cost/process/busy_rate": min(1.0, self._busy_seconds / available) if available else 0.0,
            "cost/process/peak_bytes": float(max(self._peak_bytes, peak_bytes())),
        }

    def state_dict(self) -> dict[str, Any]:
        """See ``Persisted``: how long each client took the last time, for placing."""
        return {"seconds": {str(row): seconds for row, seconds in self._seconds.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Persisted``."""
        self._seconds = {int(row): seconds for row, seconds in state["seconds"].items()}

    def _score_stage(self, jobs: Sequence[ScoreJob], stage: str, round_index: int) -> None:
        datamodule = self.local.evaluator.datamodule
        users = [datamodule.num_users(stage, job.clients) for job in jobs]
        tasks, costs = [], []
        for job, num_users in zip(jobs, users, strict=True):
            fair = -(-num_users * self.pool.num_processes // max(1, sum(users)))
            num_parts = max(1, min(fair, -(-num_users // datamodule.eval_batch_size)))
            for part in range(num_parts):
                tasks.append(self._scoring(job, stage, round_index, part, num_parts))
                costs.append(num_users / num_parts)
        for _ in self.pool.run(tasks, costs):
            pass

    def _training(self, jobs: Sequence[Job], events: Events) -> Task:
        """The training of a group of clients; of one, unless ``trainer.clients_per_step`` is above 1."""

        def run() -> list[Trained | Failed]:
            """Train here."""
            for job in jobs:
                events.client_starts(job)
            return self.local.train_group(jobs, on_step)

        def on_step(job: Job, loss: float) -> None:
            """Tell the callbacks, and take messages of other processes."""
            events.call("on_step_end", loss)
            self.pool.poll()

        def result(answer: Message) -> list[Trained | Failed]:
            """What another process trained; callbacks are told as if it had been trained here."""
            if not isinstance(answer, ClientsTrained) or len(answer.outcomes) != len(jobs):
                raise SplitError(f"unexpected message {type(answer).__name__} for the training of {of_jobs(jobs)}")
            outcomes = []
            for job, own in zip(jobs, answer.outcomes, strict=True):
                events.client_starts(job)
                outcomes.append(self._outcome(job, own))
                for loss in own.step_losses if isinstance(own, ClientTrained) else ():
                    events.call("on_step_end", loss)
            return outcomes

        return Task(
            message=lambda process: TrainClients(tuple(self._train_message(job, process) for job in jobs)),
            run=run,
            result=result,
            lost=lambda reason: [Failed(job, reason) for job in jobs],
            activity=f"training {of_jobs(jobs)} in round {jobs[0].round_index}",
        )

    def _train_message(self, job: Job, process: int) -> TrainClient:
        return TrainClient(
            row=job.row,
            data_of=job.data_of,
            round_index=job.round_index,
            first_step=job.first_step,
            adapter=job.adapter.tensors(),
            optimizer=job.optimizer.tensors(),
            anchors={name: stored.tensors() for name, stored in job.anchors.items()},
            tensors=job.tensors.tensors(),
            trains=job.trains,
            needs_start_loss=job.needs_start_loss,
            base=len(job.base),
            changes=self._new_changes(job.base, process),
        )

    def _new_changes(self, base: tuple[StoredTensors, ...], process: int) -> tuple[Mapping[str, Tensor], ...]:
        sent = self._sent_changes.get(process, 0)
        self._sent_changes[process] = max(sent, len(base))
        return tuple(change.tensors() for change in base[sent:])

    def _outcome(self, job: Job, answer: ClientTrained | ClientFailed) -> Trained | Failed:
        if answer.row != job.row:
            raise SplitError(f"unexpected message {type(answer).__name__} for the training of {job.who}")
        self.ledger.merge(answer.ledger)
        if isinstance(answer, ClientFailed):
            return Failed(job, answer.reason)
        adapter, optimizer, tensors = (
            StoredTensors({name: tensor.cpu() for name, tensor in found.items()})
            for found in (answer.adapter, answer.optimizer, answer.tensors)
        )
        scalars = {name: getattr(answer, name) for name in SCALARS}
        return Trained(job=job, adapter=adapter, optimizer=optimizer, tensors=tensors, **scalars)

    def _measuring(self, job: LossJob) -> Task:
        def result(answer: Message) -> tuple[int, tuple[float, ...]]:
            """The row and the losses that another process measured."""
            is_fitting = isinstance(answer, LossesMeasured) and len(answer.losses) == len(job.adapters)
            if not isinstance(answer, LossesMeasured) or not is_fitting or answer.row != job.row:
                raise SplitError(f"unexpected message {type(answer).__name__} for the losses of client {job.client}")
            self.ledger.merge(answer.ledger)
            return job.row, answer.losses

        def message(process: int) -> MeasureLosses:
            """What a process is asked."""
            adapters = tuple(adapter.tensors() for adapter in job.adapters)
            changes = self._new_changes(job.base, process)
            return MeasureLosses(job.row, job.data_of, job.round_index, adapters, len(job.base), changes)

        return Task(
            message=message,
            run=lambda: (job.row, self.local.measure_one(job)),
            result=result,
            lost=lambda reason: (job.row, (math.nan,) * len(job.adapters)),
            activity=f"measuring losses of client {job.client} in round {job.round_index}",
        )

    def _scoring(self, job: ScoreJob, stage: str, round_index: int, part: int, num_parts: int) -> Task:
        evaluator = self.local.evaluator

        def result(answer: Message) -> None:
            """Add the metrics of the users that another process ranked."""
            if not isinstance(answer, Scored):
                raise SplitError(f"unexpected message {type(answer).__name__} for the scoring of client {job.row}")
            self.ledger.merge(answer.ledger)
            with reading(answer):
                evaluator.module.add_users(answer.users)

        def message(process: int) -> ScoreClients:
            """What a process is asked."""
            changes = self._new_changes(job.base, process)
            where = stage, round_index, part, num_parts, len(job.base), changes
            return ScoreClients(job.row, job.adapter.tensors(), job.clients, *where)

        return Task(
            message=message,
            run=lambda: evaluator.score(job, stage, round_index, part, num_parts),
            result=result,
            lost=None,
            activity=f"scoring the users of client {job.row}",
        )


class Worker:
    """A process that trains and evaluates as the coordinator asks, and keeps nothing.

    Args:
        local: Carries out jobs.
        ledger: Of its executor's link; sent with every answer.
        report: Tells the channel what this process does, for error messages.
        check: Called between two optimiser steps; raises if another process has ended.
    """

    def __init__(
        self,
        local: SerialExecutor,
        ledger: Ledger,
        report: Callable[[str], None] = lambda text: None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.local = local
        self.ledger = ledger
        self._report = report
        self._check = check
        self._changes: list[StoredTensors] = []

    def train(self, message: TrainClients) -> Message:
        """Train a group of clients."""
        jobs = [self._job(client) for client in message.clients]
        self._report(f" while this process was training {of_jobs(jobs)} in round {jobs[0].round_index}")
        losses: dict[int, list[float]] = {job.row: [] for job in jobs}

        def on_step(job: Job, loss: float) -> None:
            """Keep the loss for the coordinator's callbacks, and see whether another process has ended."""
            losses[job.row].append(loss)
            self._check()

        outcomes = self.local.train_group(jobs, on_step)
        return ClientsTrained(tuple(self._answer(outcome, losses[outcome.row]) for outcome in outcomes))

    def _job(self, message: TrainClient) -> Job:
        self._changes += [StoredTensors(factors) for factors in message.changes]
        return Job(
            row=message.row,
            data_of=message.data_of,
            round_index=message.round_index,
            first_step=message.first_step,
            adapter=StoredTensors(message.adapter),
            optimizer=StoredTensors(message.optimizer),
            anchors={name: StoredTensors(tensors) for name, tensors in message.anchors.items()},
            tensors=StoredTensors(message.tensors),
            trains=message.trains,
            needs_start_loss=message.needs_start_loss,
            base=tuple(self._changes[: message.base]),
        )

    def _answer(self, outcome: Trained | Failed, losses: Sequence[float]) -> ClientTrained | ClientFailed:
        if isinstance(outcome, Failed):
            return ClientFailed(outcome.row, outcome.reason, self._rows())
        return ClientTrained(
            row=outcome.row,
            adapter=outcome.adapter.tensors(),
            optimizer=outcome.optimizer.tensors(),
            tensors=outcome.tensors.tensors(),
            **outcome.scalars,
            step_losses=tuple(losses),
            ledger=self._rows(),
        )

    def measure(self, message: MeasureLosses) -> Message:
        """Let one client measure losses."""
        self._report(f" while this process was measuring losses of client {message.row}")
        self._changes += [StoredTensors(factors) for factors in message.changes]
        base, adapters = tuple(self._changes[: message.base]), tuple(map(StoredTensors, message.adapters))
        losses = self.local.measure_one(LossJob(message.row, message.data_of, message.round_index, adapters, base=base))
        return LossesMeasured(message.row, losses, self._rows())

    def score(self, message: ScoreClients) -> Message:
        """Rank for the users of some clients."""
        self._report(f" while this process was scoring users of client {message.row}")
        self._changes += [StoredTensors(factors) for factors in message.changes]
        base = tuple(self._changes[: message.base])
        job = ScoreJob(message.row, StoredTensors(message.adapter), message.clients, base)
        evaluator = self.local.evaluator
        evaluator.score(job, message.stage, message.round_index, message.part, message.num_parts)
        return Scored(evaluator.module.take_users(), self._rows())

    def _rows(self) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(row) for row in self.ledger.take())
