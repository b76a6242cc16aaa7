"""Local training of one client: its adapter in the backbone, its data, its optimiser state."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from lightning import Fabric

from fellrec.data.datamodule import FellrecDataModule
from fellrec.distributed.batch_sharing import BatchSharing
from fellrec.errors import FellrecError, SplitError, TrainingError
from fellrec.functional.rng import derive_seed
from fellrec.functional.schedules import DECAYS
from fellrec.models.module import FellrecModule, PreparesSteps
from fellrec.models.streams import OF_LOSS, StreamPosition, training_seed
from fellrec.types import ClientUpdate

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LocalSettings:
    """How a client trains in one round.

    Attributes:
        local_epochs: Passes over the client's data, at least 1.
        max_local_steps: Upper bound on the optimiser steps of one round, ``None`` for no bound.
        accumulate_grad_batches: Batches whose gradients make one optimiser step.
        gradient_clip: Largest gradient norm, ``None`` for no clipping.
        reset_optimizer: Forget the client's optimiser state at the start of a round.
        warmup_steps: The learning rate rises linearly over the client's first steps, counted over all rounds.
        learning_rate_decay: How the learning rate falls to 0 over the run's rounds: ``"linear"``, ``"cosine"``, or
            ``"none"``.
        num_rounds: Rounds of the run.
        seed: Seed of the run; batch order and dropout depend on (seed, round, client) only.
    """

    local_epochs: int = 1
    max_local_steps: int | None = None
    accumulate_grad_batches: int = 1
    gradient_clip: float | None = 1.0
    reset_optimizer: bool = False
    warmup_steps: int = 0
    learning_rate_decay: str = "none"
    num_rounds: int = 1
    seed: int = 0


class LocalTrainer:
    """Trains the adapter that is in the module on one client's data.

    Args:
        fabric: Device and precision.
        module: The recommender; its trainable parameters hold the client's adapter.
        datamodule: Batches by client.
        optimizer: Over the module's trainable parameters.
        settings: How to train.
        sharing: This rank's part where several train one client together; ``None`` to train alone.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: FellrecModule,
        datamodule: FellrecDataModule,
        optimizer: torch.optim.Optimizer,
        settings: LocalSettings,
        sharing: BatchSharing | None = None,
    ) -> None:
        self.fabric = fabric
        self.module = module
        self.datamodule = datamodule
        self.optimizer = optimizer
        self.settings = settings
        self.sharing = sharing

    def num_steps(self, client: int | None) -> int:
        """Optimiser steps that one round of this client takes; the pooled client may take those of all clients."""
        batches = self.datamodule.num_batches(client)
        steps = self.settings.local_epochs * -(-batches // self.settings.accumulate_grad_batches)
        clients = 1 if client is not None else self.datamodule.data.num_clients
        return min(steps, clients * self.settings.max_local_steps) if self.settings.max_local_steps else steps

    def train(
        self, client: int, data_of: int | None, round_index: int, first_step: int, on_step: Callable[[float], None]
    ) -> ClientUpdate:
        """Run one round of local training in place.

        Args:
            client: Index of the client, for seeds and messages.
            data_of: Client whose data is used; ``None`` is the pooled data of all.
            round_index: Round, from 0.
            first_step: Optimiser steps that this client took in earlier rounds.
            on_step: Called after every step with the batch's mean loss.

        Raises:
            TrainingError: If a loss or the adapter is not finite, or something else fails; names client and round.
        """
        started = time.perf_counter()
        seed_of_loss = training_seed(self.settings.seed, round_index, client)
        seed = seed_of_loss if self.sharing is None else self.sharing.seed(seed_of_loss)
        position = StreamPosition(seed, seed_of_loss)
        self.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        total, num_targets, steps = 0.0, 0, 0
        devices = [self.fabric.device] if self.fabric.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), self.module.model.streams.using(position):
            torch.manual_seed(seed)
            for step_total, count in self._take_steps(client, data_of, round_index, first_step):
                loss = step_total / count
                if not math.isfinite(loss):
                    raise TrainingError(diverged(client, round_index, steps, loss))
                total, num_targets, steps = total + step_total, num_targets + count, steps + 1
                on_step(loss)
        self._check_finite(client, round_index)
        return ClientUpdate(
            client=client,
            num_samples=self.datamodule.num_samples(data_of),
            num_steps=steps,
            loss=total / max(num_targets, 1),
            seconds=time.perf_counter() - started,
        )

    def steps(self, client: int, data_of: int | None, round_index: int) -> Iterator[list[Batch]]:
        """The batches of each optimiser step of one round, on the device; an epoch's last step may have fewer."""
        left, together = self.num_steps(data_of), self.settings.accumulate_grad_batches
        for epoch in range(self.settings.local_epochs):
            seed = derive_seed(self.settings.seed, "order", round_index, client, epoch)
            batches = iter(self.datamodule.train_loader(data_of, seed))
            while left and (step := [self.fabric.to_device(batch) for batch in islice(batches, together)]):
                left -= 1
                yield step

    def _take_steps(
        self, client: int, data_of: int | None, round_index: int, first_step: int
    ) -> Iterator[tuple[float, int]]:
        """Take one round's local steps; gives each one's loss, summed over its targets, and their number."""
        try:
            for step, batches in enumerate(self.steps(client, data_of, round_index)):
                self._set_learning_rate(first_step + step, self.progress(round_index, step, data_of))
                self._prepare_step(round_index, step)
                yield self._step(batches)
        except SplitError as error:
            raise SplitError(f"{error}, in the training of client {client} in round {round_index}") from error
        except FellrecError:
            raise
        except Exception as error:  # out of memory or a mistake in an objective: the client cannot finish
            first_line = (str(error).splitlines() or [""])[0]
            raise TrainingError(
                f"the training of client {client} failed in round {round_index} with {type(error).__name__}: "
                f"{first_line} (--debug shows where)"
            ) from error

    def _prepare_step(self, round_index: int, step: int) -> None:
        objective = self.module.objective
        if isinstance(objective, PreparesSteps):
            # A context of its own: what it has cast without gradients must not be found by the training step.
            with self.fabric.autocast():
                objective.prepare_step(self.module.model, round_index, step)

    def progress(self, round_index: int, step: int, data_of: int | None) -> float:
        """The share of the run that is over before a step of a round, both from 0; in [0, 1)."""
        return (round_index + step / self.num_steps(data_of)) / max(self.settings.num_rounds, round_index + 1)

    def learning_rate(self, step: int, progress: float) -> float:
        """The optimiser's step size.

        Args:
            step: Of the client in all rounds, from 0.
            progress: See ``progress``.
        """
        warmup, full = self.settings.warmup_steps, self.module.optimizer_settings.learning_rate
        risen = min(1.0, (step + 1) / warmup) if warmup else 1.0
        return full * risen * DECAYS[self.settings.learning_rate_decay](progress)

    def _step(self, batches: list[Batch]) -> tuple[float, int]:
        count = sum(len(batch["targets"]) for batch in batches)
        parameters = list(self.module.trainable.values())
        if self.sharing is None:
            total = self._backward(batches, count)
        else:
            total, error = float("nan"), None
            try:
                total = self._backward(self._shares(batches, self.sharing), count)
            except Exception as failure:  # the others of the group must hear of it, whatever it is
                error = failure
            total = self.sharing.combine(parameters, total, error)
        if self.settings.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.gradient_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, count

    def _shares(self, batches: list[Batch], sharing: BatchSharing) -> Iterator[Batch]:
        """This rank's rows of the batches, one batch after the other: each has its own random numbers of the loss."""
        for batch in batches:
            mine = sharing.share(batch)
            if mine is None:
                self.module.model.streams.skip(OF_LOSS)
            else:
                yield mine

    def _backward(self, batches: Iterable[Batch], count: int) -> float:
        """Add the gradients of the batches' loss, divided by ``count``, and return the loss's sum over the targets."""
        total = 0.0
        for batch in batches:
            with self.fabric.autocast():
                batch_total, _ = self.module.objective.loss(self.module.model, batch)
            self.fabric.backward(batch_total / count)
            total += float(batch_total.detach())
        return total

    def _check_finite(self, client: int, round_index: int) -> None:
        """A last step can spoil the adapter after its loss was finite."""
        for name, parameter in self.module.trainable.items():
            if not bool(parameter.isfinite().all()):
                raise TrainingError(
                    f"{name} of client {client} is not finite after local training in round {round_index}; "
                    "lower trainer.learning_rate"
                )

    def _set_learning_rate(self, step: int, progress: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step, progress)


def diverged(client: int, round_index: int, step: int, loss: float) -> str:
    """Word the message for a loss that is not finite."""
    return (
        f"the training loss of client {client} became {loss} in round {round_index}, local step {step}; "
        "lower trainer.learning_rate or check the data"
    )
