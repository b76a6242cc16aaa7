"""Local training of several clients at once: one forward and backward pass over the rows of all of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fellrec.errors import ConfigError, TrainingError
from fellrec.federated.local import Batch, LocalTrainer, Tally, naming
from fellrec.federated.records import Failed, Job, Trained, of_jobs
from fellrec.federated.slot import LocalSlot
from fellrec.models.joint_lora import JointClient, JointLora, draws_numbers
from fellrec.models.module import drawn
from fellrec.models.streams import StreamPosition, drawing, training_seed

_log = logging.getLogger(__name__)
OnClientStep = Callable[[Job, float], None]


@dataclass
class _Training:
    """One client of a group.

    Attributes:
        job: What is trained.
        slot: Its parameters and optimiser.
        client: The same for the model.
        steps: The batches of each optimiser step that is left.
        tally: What its steps add up.
        batches: Of the present step.
        loss: Of the present step, summed over its targets.
        failure: Why it cannot finish; empty while it can.
    """

    job: Job
    slot: LocalSlot
    client: JointClient
    steps: Iterator[list[Batch]]
    tally: Tally
    batches: list[Batch] = field(default_factory=list)
    loss: float = 0.0
    failure: str = ""

    @property
    def num_targets(self) -> int:
        """Targets of the present step."""
        return sum(len(batch["targets"]) for batch in self.batches)


class JointTrainer:
    """Trains groups of clients, each with its own adapter, data, random numbers, loss and optimiser state.

    A client's result is that of `LocalTrainer` up to rounding, whoever is trained beside it: dropout draws the same
    numbers. A client that has taken all its steps, or fails, leaves the group.

    Args:
        trainer: Trains clients alone; has the settings, the data and the whole model.

    Raises:
        ConfigError: If the model cannot train several clients at once.
    """

    def __init__(self, trainer: LocalTrainer) -> None:
        self.trainer = trainer
        self.fabric = trainer.fabric
        self.module = trainer.module
        self.lora = JointLora(trainer.module.model)
        with self.fabric.autocast():
            if draws_numbers(trainer.module.model, self.fabric.device):
                raise ConfigError(
                    f"trainer.clients_per_step={trainer.settings.clients_per_step} needs a backbone without dropout of "
                    "its own, beside adapter.dropout: set it to 0 in the backbone's config.json, or train one client "
                    "at a time"
                )

    def groups(self, jobs: Sequence[Job], num_processes: int = 1) -> list[list[Job]]:
        """Jobs that are done together: those with the most steps first, so that few clients wait for others.

        Args:
            jobs: All of a round.
            num_processes: Each of which should have a group, if there are enough jobs.
        """
        size = min(self.trainer.settings.clients_per_step, max(1, -(-len(jobs) // num_processes)))
        groups: list[list[Job]] = []
        for version in sorted({len(job.base) for job in jobs}):  # a group has the same frozen weights
            own = [job for job in jobs if len(job.base) == version]
            own.sort(key=lambda job: -self.trainer.num_steps(job.data_of))
            groups += [own[first : first + size] for first in range(0, len(own), size)]
        return groups

    def train(self, jobs: Sequence[Job], on_step: OnClientStep) -> list[Trained | Failed]:
        """Run one round of local training of a group; the results are in the order of the jobs.

        Args:
            jobs: What to train; with the same changes of the base.
            on_step: Called after every optimiser step of a client with its mean loss.
        """
        begun = [self._begin(job) for job in jobs]
        active = [training for training in begun if isinstance(training, _Training)]
        devices = [self.fabric.device] if self.fabric.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self.module.train()
            while active := [training for training in active if self._has_step(training)]:
                started = time.perf_counter()
                self._step(active)
                seconds = (time.perf_counter() - started) / len(active)
                for training in active:
                    training.tally.seconds += seconds
                    if not training.failure:
                        training.tally.add(training.loss, training.num_targets)
                        on_step(training.job, training.loss / training.num_targets)
        return [self._end(training) if isinstance(training, _Training) else training for training in begun]

    def _begin(self, job: Job) -> _Training | Failed:
        trainer, started = self.trainer, time.perf_counter()
        try:
            # The slot outlasts this; the model has its parameters for the loss only.
            with trainer.model.training(job, trainer.num_steps(job.data_of)) as slot, naming(job.who, job.round_index):
                assert isinstance(slot, LocalSlot), "trainer.clients_per_step needs the whole model in this process"
                start_loss = trainer.start_loss(job)
        except TrainingError as error:
            return _failed(job, error)
        seed = training_seed(trainer.seed, job.round_index, job.row)
        client = JointClient(slot.parameters, StreamPosition(seed, place=seed))
        tally = Tally(seconds=time.perf_counter() - started, start_loss=start_loss)
        return _Training(job, slot, client, trainer.batches(job), tally)

    def _has_step(self, training: _Training) -> bool:
        """Whether a client takes another step; gives it the step's batches."""
        training.batches, training.loss = [], 0.0
        with _noting_failures(training):
            training.batches = next(training.steps, [])
        return bool(training.batches)

    def _step(self, active: Sequence[_Training]) -> None:
        """One optimiser step of each client."""
        has_norms = self.trainer.settings.gradient_clip is not None
        rates = [self.trainer.learning_rate_of(training.job, training.tally.num_steps) for training in active]
        for training, rate in zip(active, rates, strict=True):
            training.slot.before_backward(has_norms, rate)
        with _noting_failures(*active):  # such as out of memory: it is not known whose rows were too many
            for number in range(max(len(training.batches) for training in active)):
                here = [training for training in active if number < len(training.batches) and not training.failure]
                self._backward(here, number)
        for training, rate in zip(active, rates, strict=True):
            if not training.failure:
                loss, step = training.loss / training.num_targets, training.tally.num_steps
                with _noting_failures(training):
                    self.trainer.take_step(training.job, step, training.slot, loss, rate)
        self.module.model.times.enter(None)

    def _backward(self, trainings: Sequence[_Training], number: int) -> None:
        """Add the gradients of a micro-batch of each client, divided by the targets of its step, to its own."""
        times = self.module.model.times
        for training in trainings:
            times.count(training.batches[number])
        times.enter("logits")
        with self.fabric.autocast():
            losses = self._losses(trainings, number)
            shares = [loss / training.num_targets for training, loss in losses]
        if shares:
            self.fabric.backward(torch.stack(shares).sum())
            found = torch.stack([loss.detach() for _, loss in losses]).tolist()
            for (training, _), loss in zip(losses, found, strict=True):
                training.loss += loss
        times.enter("optimiser")

    def _losses(self, trainings: Sequence[_Training], number: int) -> list[tuple[_Training, Tensor]]:
        """The loss of a micro-batch of each client, summed over its targets; without those that fail."""
        objective, model = self.module.objective, self.module.model
        batches = []
        for training in trainings:
            with model.streams.using(training.client.position):
                batches.append(drawn(objective, training.batches[number], model.streams))
        hidden = self.lora.encode(
            [training.client for training in trainings], [objective.inputs(batch) for batch in batches]
        )
        losses = []
        for training, own, batch in zip(trainings, hidden, batches, strict=True):
            position = training.client.position
            with _noting_failures(training), model.streams.using(position), drawing(position, self.fabric.device):
                losses.append((training, objective.loss_of(model, own, batch)[0]))
        return losses

    def _end(self, training: _Training) -> Trained | Failed:
        job, found = training.job, None
        if not training.failure:
            with _noting_failures(training):
                found = self.trainer.trained(job, training.slot.state(), training.tally)
        return found or Failed(job, training.failure)


@contextmanager
def _noting_failures(*trainings: _Training) -> Iterator[None]:
    """While this lasts, an error is a failure of these clients, and no error."""
    jobs = [training.job for training in trainings]
    try:
        with naming(of_jobs(jobs), jobs[0].round_index):
            yield
    except TrainingError as error:
        for training in trainings:
            training.failure = training.failure or _failed(training.job, error).reason


def _failed(job: Job, error: TrainingError) -> Failed:
    _log.debug("a client's training failed", exc_info=error)
    return Failed(job, str(error))
