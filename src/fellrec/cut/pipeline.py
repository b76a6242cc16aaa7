"""Local training through the cut: several clients are under way, so that neither side waits for the other in turn."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from lightning import Fabric
from torch import Tensor, nn

from fellrec.cut.head_cache import HeadCache
from fellrec.cut.link import ServerLink
from fellrec.cut.messages import (
    Finish,
    Gradient,
    GradientReply,
    HiddenReply,
    HiddenState,
    Message,
    Step,
)
from fellrec.errors import SplitError, TrainingError
from fellrec.federated.local import Batch, LocalTrainer, diverged
from fellrec.federated.slot import AdapterSlot, clip_factor
from fellrec.federated.state import RunState
from fellrec.functional.packing import Packed, pack, unpack
from fellrec.models.module import FellrecModule, drawn
from fellrec.models.parameter_swap import ParameterSwap
from fellrec.models.streams import StreamPosition, training_seed
from fellrec.types import ClientUpdate


@dataclass(frozen=True)
class CutSettings:
    """How the cut is crossed in training.

    Attributes:
        in_flight: Clients that are under way at the same time.
        hidden_dtype: Packing of hidden states, see ``fellrec.functional.packing``.
        gradient_dtype: Packing of gradients.
        body_names: The body's trainable parameters, sorted; the server has them.
    """

    in_flight: int = 2
    hidden_dtype: str = "float32"
    gradient_dtype: str = "float32"
    body_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One client's local training in a round.

    Attributes:
        client: Row of its adapter.
        data_of: Client whose data it trains on; ``None`` for that of all.
    """

    client: int
    data_of: int | None


@dataclass
class Outcome:
    """What became of a round's jobs.

    Attributes:
        updates: Of the clients that finished, in order of the jobs.
        failures: Client → why it did not finish.
    """

    updates: list[ClientUpdate] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)


_Exchange = Generator[Message, Message, ClientUpdate]


class PipelinedTrainer:
    """The client's half of local training: head, tail, loss; the body is asked of the server.

    Args:
        fabric: Device and precision.
        module: The recommender, with the client's share of the backbone.
        trainer: Batches and settings of local training.
        link: To the server.
        settings: How the cut is crossed.
        head_cache: Keeps what a frozen head computed; ``None`` for no cache.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: FellrecModule,
        trainer: LocalTrainer,
        link: ServerLink,
        settings: CutSettings,
        head_cache: HeadCache | None = None,
    ) -> None:
        self.fabric = fabric
        self.module = module
        self.trainer = trainer
        self.link = link
        self.settings = settings
        self.head_cache = head_cache
        self._swap = ParameterSwap(module.model.model, module.trainable)
        self._trains_head = any(module.model.part_of(name) == "head" for name in module.trainable)

    def train(
        self,
        jobs: Sequence[Job],
        round_index: int,
        state: RunState,
        on_start: Callable[[int], None],
        on_step: Callable[[float], None],
        on_end: Callable[[ClientUpdate], None],
    ) -> Outcome:
        """Train the clients; results do not depend on how many are under way at the same time.

        Args:
            jobs: One per client of the cohort.
            round_index: From 0.
            state: Adapters and optimiser states of head and tail; changed for the clients that finish.
            on_start: Called with the client before its training.
            on_step: Called after every optimiser step with its loss.
            on_end: Called with the client's update after its training.
        """
        self.module.train()
        outcome, waiting, queue = Outcome(), dict[int, _Exchange](), deque(jobs)
        devices = [self.fabric.device] if self.fabric.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            while queue or waiting:
                if queue and len(waiting) < self.settings.in_flight:
                    job = queue.popleft()
                    on_start(job.client)
                    client, exchange, answer = job.client, self._exchange(job, round_index, state, on_step), None
                else:
                    answer = self.link.receive()
                    client = getattr(answer, "client", -1)
                    if client not in waiting:
                        raise SplitError(f"the server sent {type(answer).__name__}, which nobody waits for")
                    exchange = waiting.pop(client)
                try:
                    message = next(exchange) if answer is None else exchange.send(answer)
                    waiting[client] = exchange
                    self.link.send(message)
                except StopIteration as finished:
                    outcome.updates.append(finished.value)
                    on_end(finished.value)
                except SplitError:
                    raise
                except TrainingError as error:
                    outcome.failures[client] = str(error)
                    self.link.send(Finish(client, round_index, "train", float("nan"), 0, keep=False))
        order = {job.client: place for place, job in enumerate(jobs)}
        outcome.updates.sort(key=lambda update: order[update.client])
        return outcome

    def _exchange(self, job: Job, round_index: int, state: RunState, on_step: Callable[[float], None]) -> _Exchange:
        """One client's round: yields what needs an answer, is sent the answer, returns the update."""
        started, client, settings = time.perf_counter(), job.client, self.trainer.settings
        streams = StreamPosition(training_seed(settings.seed, round_index, client))
        optimizer_state = state.take_optimizer(client, settings.reset_optimizer)
        slot = AdapterSlot(
            self.module.trainable, state.bank.row(client), self.module.optimizer_settings, optimizer_state, streams
        )
        total, num_targets, steps, ticket = 0.0, 0, 0, 0
        for batches in self.trainer.steps(client, job.data_of, round_index):
            count = sum(len(batch["targets"]) for batch in batches)
            step_total, norms = 0.0, torch.empty(0)
            for number, batch in enumerate(batches):
                ticket += 1
                is_last = number == len(batches) - 1
                loss, norms = yield from self._micro_batch(slot, batch, count, is_last, (client, round_index, ticket))
                step_total += loss
            mean = step_total / count
            if not math.isfinite(mean):
                raise TrainingError(diverged(client, round_index, steps, mean))
            progress = self.trainer.progress(round_index, steps, job.data_of)
            learning_rate = self.trainer.learning_rate(state.local_steps[client] + steps, progress)
            factor = self._clip_factor(slot, norms)
            slot.step(factor, learning_rate)
            self.link.send(Step(client, round_index, "train", factor, learning_rate))
            total, num_targets, steps = total + step_total, num_targets + count, steps + 1
            on_step(mean)
        loss, num_samples = total / max(num_targets, 1), self.trainer.datamodule.num_samples(job.data_of)
        self.link.send(Finish(client, round_index, "train", loss, num_samples))
        state.keep_optimizer(client, slot.optimizer_state())
        state.local_steps[client] += steps
        state.bank.store(client, slot.parameters)
        return ClientUpdate(client, num_samples, steps, loss, time.perf_counter() - started)

    def _micro_batch(
        self, slot: AdapterSlot, batch: Batch, count: int, is_last: bool, where: tuple[int, int, int]
    ) -> Generator[Message, Message, tuple[float, Tensor]]:
        """Forward and backward pass of one micro-batch through both cuts; gradients add up in the slot.

        Args:
            slot: The client's adapter.
            batch: On the device.
            count: Targets of the whole optimiser step, which the loss is divided by.
            is_last: Whether this is the step's last micro-batch.
            where: Client, round and ticket.

        Returns:
            Sum of the loss over the micro-batch's targets, and the norms of the body's gradients if ``is_last``.
        """
        client, round_index, ticket = where
        with self.module.model.streams.using(slot.streams):
            batch = drawn(self.module.objective, batch, self.module.model.streams)
        heads = self._heads(slot, batch)
        packed = tuple(pack(head, self.settings.hidden_dtype) for head in heads)
        needs_gradient = self._trains_head
        answer = yield HiddenState(client, round_index, "train", ticket, packed, needs_gradient=needs_gradient)
        if not isinstance(answer, HiddenReply) or answer.ticket != ticket:
            raise SplitError(f"client {client}, round {round_index}: {type(answer).__name__} answers a hidden state")
        outputs = [_leaf(packed, head) for packed, head in zip(answer.hidden, heads, strict=True)]
        total, gradients, own = self._loss(slot, batch, outputs, count)
        norms = torch.empty(0)
        if self.settings.body_names or needs_gradient:
            wants_norms = is_last and self.trainer.settings.gradient_clip is not None and bool(self.settings.body_names)
            packed = tuple(pack(gradient, self.settings.gradient_dtype) for gradient in gradients)
            reply = yield Gradient(client, round_index, "train", ticket, packed, wants_norms)
            if not isinstance(reply, GradientReply) or reply.ticket != ticket:
                raise SplitError(f"client {client}, round {round_index}: {type(reply).__name__} answers a gradient")
            own = self._head_gradients(slot, heads, reply, own)
            norms = reply.norms if reply.norms is not None else norms
        slot.add_gradients(own)
        return total, norms

    def _heads(self, slot: AdapterSlot, batch: Batch) -> list[Tensor]:
        model, inputs = self.module.model, self.module.objective.inputs(batch)
        with self._swap.using(slot.parameters), model.streams.using(slot.streams), self.fabric.autocast():
            if self.head_cache is not None:
                return [self.head_cache.heads(model, inputs[0], batch), *(model.head(ids) for ids in inputs[1:])]
            return [model.head(ids) for ids in inputs]

    def _loss(
        self, slot: AdapterSlot, batch: Batch, outputs: list[Tensor], count: int
    ) -> tuple[float, tuple[Tensor, ...], list[Tensor | None]]:
        """The loss's sum, its gradients by the body's outputs, and those by the slot's parameters so far."""
        model = self.module.model
        with self._swap.using(slot.parameters), model.streams.using(slot.streams), self.fabric.autocast():
            total, _ = self.module.objective.loss_of(model, [model.tail(output) for output in outputs], batch)
        parameters: list[nn.Parameter] = list(slot.parameters.values())
        found = torch.autograd.grad(total / count, [*outputs, *parameters], allow_unused=True)
        gradients = tuple(torch.zeros_like(o) if g is None else g for g, o in zip(found, outputs))
        return float(total.detach()), gradients, list(found[len(outputs) :])

    def _head_gradients(
        self, slot: AdapterSlot, heads: list[Tensor], reply: GradientReply, own: list[Tensor | None]
    ) -> list[Tensor | None]:
        """Add what came back through the body to the gradients of the tail."""
        if not self._trains_head:
            return own
        arrived = [_gradient(packed, head) for packed, head in zip(reply.gradient, heads, strict=True)]
        found = torch.autograd.grad(heads, list(slot.parameters.values()), arrived, allow_unused=True)
        return [a if b is None else b if a is None else a + b for a, b in zip(own, found, strict=True)]

    def _clip_factor(self, slot: AdapterSlot, norms: Tensor) -> float:
        largest = self.trainer.settings.gradient_clip
        if largest is None:
            return 1.0
        own = dict(zip(slot.parameters, slot.norms().tolist(), strict=True))
        return clip_factor(own | dict(zip(self.settings.body_names, norms.tolist(), strict=True)), largest)


def _leaf(packed: Packed, like: Tensor) -> Tensor:
    return unpack(packed, like.dtype, like.device).detach().requires_grad_()


def _gradient(packed: Packed, like: Tensor) -> Tensor:
    return unpack(packed, like.dtype, like.device)
