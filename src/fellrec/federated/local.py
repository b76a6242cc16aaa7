"""Local training of one client in one round: the same loop for the whole model and through the cut."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from lightning import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import Tensor
from torch.amp import GradScaler

from fellrec.data.datamodule import FellrecDataModule
from fellrec.distributed.batch_sharing import BatchSharing
from fellrec.distributed.memory import peak_bytes
from fellrec.errors import FellrecError, SplitError, TrainingError
from fellrec.federated.client_model import ClientModel
from fellrec.federated.records import Job, LossJob, Trained, not_finite
from fellrec.federated.settings import TrainerSettings
from fellrec.federated.slot import LocalSlot, Slot, clip_factor
from fellrec.federated.slot_state import SlotState
from fellrec.functional.rng import derive_seed
from fellrec.functional.schedules import DECAYS
from fellrec.models.module import FellrecModule, HasMembers, PreparesSteps
from fellrec.models.streams import OF_LOSS, StreamPosition, training_seed
from fellrec.state.tensor_store import StoredTensors

Batch = dict[str, Tensor]
OnStep = Callable[[float], None]


@dataclass
class Tally:
    """What the training of one client in one round adds up.

    Attributes:
        loss: Sum over all targets of the steps.
        num_targets: Their number.
        num_steps: Optimiser steps.
        seconds: Wall seconds.
        start_loss: Mean training loss at the received adapter; ``None`` if it was not asked for.
    """

    loss: float = 0.0
    num_targets: int = 0
    num_steps: int = 0
    seconds: float = 0.0
    start_loss: float | None = None

    def add(self, loss: float, num_targets: int) -> None:
        """Count an optimiser step, with its loss summed over its targets."""
        self.loss += loss
        self.num_targets += num_targets
        self.num_steps += 1


class LocalTrainer:
    """Trains one client after the other, each with its own adapter, data and optimiser state.

    A client's result is a function of its job and the seed of the run: batch order and dropout depend on (seed, round,
    row) only.

    Args:
        fabric: Device and precision.
        module: The recommender; ``module.training_step`` computes the local loss.
        datamodule: Batches by client.
        model: Puts the client's parameters into the module.
        settings: How clients train.
        seed: Of the run.
        sharing: This process's part where several processes train one client together; ``None`` to train alone.
        held_out: Fraction of each client's training rows that are not trained on, for `measure`.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: FellrecModule,
        datamodule: FellrecDataModule,
        model: ClientModel,
        settings: TrainerSettings,
        seed: int,
        sharing: BatchSharing | None = None,
        held_out: float = 0.0,
    ) -> None:
        self.fabric = fabric
        self.module = module
        self.datamodule = datamodule
        self.model = model
        self.settings = settings
        self.seed = seed
        self.sharing = sharing
        self.held_out = held_out

    def num_steps(self, data_of: int | None) -> int:
        """Optimiser steps of one round on a client's data; pooled data may take those of all clients."""
        batches = self.datamodule.num_batches(data_of, self.held_out)
        steps = self.settings.local_epochs * -(-batches // self.settings.accumulate_grad_batches)
        clients = 1 if data_of is not None else self.datamodule.data.num_clients
        return min(steps, clients * self.settings.max_local_steps) if self.settings.max_local_steps else steps

    def train(self, job: Job, on_step: OnStep) -> Trained:
        """Run one round of local training.

        Args:
            job: What to train.
            on_step: Called after every optimiser step with its mean loss.

        Raises:
            TrainingError: If a loss or the adapter is not finite, or something else fails; names client and round.
        """
        started, tally = time.perf_counter(), Tally()
        with self.model.training(job, self.num_steps(job.data_of)) as slot:
            self._scale_loss(slot)
            with naming(job.who, job.round_index):
                tally.start_loss = self.start_loss(job)
            with self._random_numbers(job):
                for loss, count in self._steps(job, slot):
                    tally.add(loss, count)
                    on_step(loss / count)
            with naming(job.who, job.round_index):
                state = slot.state()
        tally.seconds = time.perf_counter() - started
        return self.trained(job, state, tally)

    def trained(self, job: Job, state: SlotState, tally: Tally) -> Trained:
        """The result of a job, from what its slot and its steps ended with.

        Raises:
            TrainingError: If the adapter or a tensor of the client is not finite: the last step can spoil them.
        """
        for name, tensor in {**state.adapter, **state.tensors}.items():
            if not bool(tensor.isfinite().all()):
                raise TrainingError(not_finite(name, job.who, job.round_index))
        return Trained(
            job=job,
            adapter=StoredTensors(state.adapter),
            optimizer=StoredTensors(state.optimizer),
            loss=tally.loss / max(tally.num_targets, 1),
            num_samples=self.datamodule.num_samples(job.data_of, self.held_out),
            num_steps=tally.num_steps,
            seconds=tally.seconds,
            start_loss=tally.start_loss,
            tensors=StoredTensors(state.tensors),
            peak_bytes=peak_bytes(),
            traffic=self.model.traffic(job),
        )

    def batches(self, job: Job) -> Iterator[list[Batch]]:
        """The batches of each optimiser step of a round, on the device; an epoch's last step may have fewer."""
        left, together = self.num_steps(job.data_of), self.settings.accumulate_grad_batches
        for epoch in range(self.settings.local_epochs):
            seed = derive_seed(self.seed, "order", job.round_index, job.row, epoch)
            batches = iter(self.datamodule.train_loader(job.data_of, seed, self.held_out))
            while left and (step := self._next(batches, together)):
                left -= 1
                yield step

    def _next(self, batches: Iterator[Batch], together: int) -> list[Batch]:
        times = self.module.model.times
        times.enter("data")
        step = [self.fabric.to_device(batch) for batch in islice(batches, together)]
        times.enter(None)
        return step

    def learning_rate(self, step: int, progress: float) -> float:
        """The optimiser's step size.

        Args:
            step: Of the client in all rounds, from 0.
            progress: Fraction of the run that is over, in [0, 1).
        """
        warmup = self.settings.warmup_steps
        risen = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return self.settings.learning_rate * risen * DECAYS[self.settings.learning_rate_decay](progress)

    def learning_rate_of(self, job: Job, step: int) -> float:
        """The step size of an optimiser step of a round, counted from 0."""
        rounds = max(self.settings.num_rounds, job.round_index + 1)
        progress = (job.round_index + step / self.num_steps(job.data_of)) / rounds
        return self.learning_rate(job.first_step + step, progress)

    def _steps(self, job: Job, slot: Slot) -> Iterator[tuple[float, int]]:
        """Take one round's optimiser steps; gives each one's loss, summed over its targets, and their number."""
        self.module.train()
        of_second = self._position(training_seed(self.seed, job.round_index, job.row))
        with naming(job.who, job.round_index):
            for step, batches in enumerate(self.batches(job)):
                if slot.second is not None:
                    with slot.second.at_point(), self.module.model.streams.using(of_second):
                        self._step(job, step, slot.second, batches)
                found = self._step(job, step, slot, batches)
                self.module.model.times.enter(None)
                yield found

    def _step(self, job: Job, step: int, slot: Slot, batches: list[Batch]) -> tuple[float, int]:
        self._prepare_step(job, step)
        learning_rate = self.learning_rate_of(job, step)
        count = sum(len(batch["targets"]) for batch in batches)
        if self.sharing is None:
            total = self._backward(slot, batches, count, len(batches), learning_rate)
        else:
            total = self._backward_together(slot, batches, count, self.sharing, learning_rate)
        self.take_step(job, step, slot, total / count, learning_rate)
        return total, count

    def take_step(self, job: Job, step: int, slot: Slot, loss: float, learning_rate: float) -> None:
        """Clip the gradients of an optimiser step and take it.

        Raises:
            TrainingError: If its mean loss is not finite.
        """
        if not math.isfinite(loss):
            raise TrainingError(_diverged(job, step, loss))
        largest = self.settings.gradient_clip
        factor = 1.0 if largest is None else clip_factor(slot.norms(), largest)
        slot.step(factor, learning_rate)

    def _backward(
        self, slot: Slot, batches: Iterable[Batch], count: int, num_batches: int, learning_rate: float
    ) -> float:
        """Add the gradients of the batches' loss, divided by ``count``; gives the loss's sum over the targets."""
        total, times = 0.0, self.module.model.times
        for number, batch in enumerate(batches):
            times.count(batch)
            times.enter("logits")
            is_last = number == num_batches - 1
            slot.before_backward(is_last and self.settings.gradient_clip is not None, learning_rate)
            with self.fabric.autocast():
                output: dict[str, Any] = self.module.training_step(batch, number)
            loss_sum = output["loss_sum"] if "loss_sum" in output else output["loss"] * len(batch["targets"])
            self.fabric.backward(loss_sum / count)
            total += float(loss_sum.detach())
            times.enter("optimiser")
        return total

    def _backward_together(
        self, slot: Slot, batches: list[Batch], count: int, sharing: BatchSharing, learning_rate: float
    ) -> float:
        """The same where several processes train the client: each takes its rows, and gradients are summed."""
        assert isinstance(slot, LocalSlot), "trainer.devices_per_client needs the whole model in every process"
        total, error = float("nan"), None
        try:
            total = self._backward(slot, self._own_rows(batches, sharing), count, len(batches), learning_rate)
        except Exception as failure:  # the other processes of the group must be told, whatever it is
            error = failure
        return sharing.combine(list(slot.parameters.values()), total, error)

    def _own_rows(self, batches: list[Batch], sharing: BatchSharing) -> Iterator[Batch]:
        """This process's rows of the batches; each batch has its own random numbers of the loss."""
        for batch in batches:
            mine = sharing.share(batch)
            if mine is None:
                self.module.model.streams.skip(OF_LOSS)
            else:
                yield mine

    def _scale_loss(self, slot: Slot) -> None:
        """With 16-mixed, begin with a new scale of the loss: a result must not depend on who was trained before."""
        precision = self.fabric.strategy.precision
        if isinstance(precision, MixedPrecision) and precision.scaler is not None:
            assert isinstance(slot, LocalSlot), "16-mixed needs the whole model in this process"
            slot.scaler = precision.scaler = GradScaler(precision.device)
            if slot.second is not None:
                slot.second.scaler = slot.scaler

    def measure(self, job: LossJob) -> tuple[float, ...]:
        """Mean loss of each adapter of a job, on the same batches, without dropout.

        Measured on the rows that are held out of the training if there are any, otherwise on the training rows. NaN if
        there are none.

        Raises:
            TrainingError: If something fails; names client and round.
        """
        losses = []
        for adapter in job.adapters:
            training = job.training(adapter)
            with self.model.training(training) as slot, naming(training.who, job.round_index):
                total, count = self._sum_of_losses(training, of_held_out=self.held_out > 0)
                losses.append(total / count if count else math.nan)
                slot.state()
        return tuple(losses)

    def start_loss(self, job: Job) -> float | None:
        """Mean loss over the client's training targets at the received adapter, without dropout, if it is needed."""
        if not job.needs_start_loss:
            return None
        total, count = self._sum_of_losses(job)
        return total / max(count, 1)

    @torch.no_grad()
    def _sum_of_losses(self, job: Job, of_held_out: bool = False) -> tuple[float, int]:
        """Sum of the losses of the client's training or held-out targets at the received adapter, and their number."""
        self.module.eval()
        total, count = 0.0, 0
        seed = derive_seed(self.seed, "start_loss", job.round_index, job.row)
        with self._random_numbers(job, seed):
            for batch in self.datamodule.loss_loader(job.data_of, self.held_out, of_held_out):
                with self.fabric.autocast():
                    output = self.module.training_step(self.fabric.to_device(batch), 0)
                targets = len(batch["targets"])
                total, count = total + float(output["loss"]) * targets, count + targets
        return total, count

    @contextmanager
    def _random_numbers(self, job: Job, seed: int | None = None) -> Iterator[None]:
        """While this lasts, random numbers are those of the client's round; the global generators are restored."""
        position = self._position(training_seed(self.seed, job.round_index, job.row) if seed is None else seed)
        devices = [self.fabric.device] if self.fabric.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self.module.model.streams.using(position):
            torch.manual_seed(position.seed)
            yield

    def _position(self, seed: int) -> StreamPosition:
        """The beginning of the random streams of a seed, of this process's part where several train the client."""
        return StreamPosition(seed if self.sharing is None else self.sharing.seed(seed), seed)

    def _prepare_step(self, job: Job, step: int) -> None:
        objective = self.module.objective
        if isinstance(objective, HasMembers):
            objective = objective.of_client(job.data_of)
        if isinstance(objective, PreparesSteps):
            # A context of its own: what it has cast without gradients must not be found by the training step.
            with self.fabric.autocast():
                objective.prepare_step(self.module.model, job.round_index, step)


@contextmanager
def naming(who: str, round_index: int) -> Iterator[None]:
    """Errors name who trains and the round while this lasts; unknown ones become ``TrainingError``.

    Out of memory, or a mistake in an objective or a local term: the client cannot finish.
    """
    try:
        yield
    except SplitError as error:
        raise SplitError(f"{error}, in the training of {who} in round {round_index}") from error
    except FellrecError:
        raise
    except Exception as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise TrainingError(
            f"the training of {who} failed in round {round_index} with {type(error).__name__}: "
            f"{first_line} (--debug shows where)"
        ) from error


def _diverged(job: Job, step: int, loss: float) -> str:
    return (
        f"the training loss of {job.who} became {loss} in round {job.round_index}, local step {step}; "
        "lower trainer.learning_rate or check the data"
    )
