"""The body server: runs the middle layers for all clients, each with its own adapter. It answers messages only."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from fellrec.cut.messages import (
    ChangeBase,
    ClientMessage,
    CloseSlot,
    DropCache,
    Gradient,
    GradientReply,
    HiddenReply,
    HiddenState,
    OpenSlot,
    Report,
    SelectRows,
    Serve,
    ServerReport,
    SlotClosed,
    Step,
    StopServing,
)
from fellrec.distributed.memory import peak_bytes
from fellrec.distributed.message import Message
from fellrec.errors import SplitError
from fellrec.federated.base_change import BaseWeights
from fellrec.federated.slot import LocalSlot
from fellrec.federated.slot_state import SlotState, new_parameters
from fellrec.federated.terms import LocalTerm
from fellrec.functional.packing import Packed, pack, unpack
from fellrec.models.module import OptimizerSettings
from fellrec.models.parameter_swap import ParameterSwap
from fellrec.models.split import SplitModel
from fellrec.models.streams import StreamPosition, training_seed
from fellrec.state.tensor_store import StoredTensors


@dataclass(frozen=True)
class ServerSettings:
    """What the server must know for its part of the training.

    Attributes:
        seed: Of the run.
        optimizer: AdamW's settings for the body's adapters.
        hidden_dtype: Packing of hidden states, see ``fellrec.functional.packing``.
        gradient_dtype: Packing of gradients.
        num_rows: Rows of the population.
    """

    seed: int
    optimizer: OptimizerSettings
    hidden_dtype: str = "float32"
    gradient_dtype: str = "float32"
    num_rows: int = 1 << 62


@dataclass
class Served:
    """A client that is being evaluated.

    Attributes:
        parameters: The body's part of its adapter.
        base: Changes of the base that it belongs to.
        head_layers: Layers of the client's head.
        num_calls: Evaluations that use it: several client processes may evaluate parts of a client's users at once.
    """

    parameters: dict[str, nn.Parameter]
    base: int
    head_layers: int
    num_calls: int = 1


@dataclass
class ServerJob:
    """A client that is being trained.

    Attributes:
        slot: The body's part of its parameters.
        streams: Its random numbers of this round.
        base: Changes of the base that it is trained with.
        head_layers: Layers of the client's head.
        graphs: Inputs and outputs of forward passes whose gradient is still to come, by number.
    """

    slot: LocalSlot
    streams: StreamPosition
    base: int
    head_layers: int
    graphs: dict[int, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)


class BodyServer:
    """Runs the body for all clients, each with its own adapter.

    It holds the body's weights, and the body's adapters of those clients that are training or being evaluated. It is
    sent what ``fellrec.cut.messages`` has, and nothing else.

    Args:
        model: The server's partial model.
        trainable: The body's adapter in it; may be empty.
        settings: See ``ServerSettings``.
        autocast: Makes the precision's context.
        base: The frozen weights of the model; one for all runs with it.
        terms: Local terms of the rule.
    """

    def __init__(
        self,
        model: SplitModel,
        trainable: Mapping[str, nn.Parameter],
        settings: ServerSettings,
        autocast: Callable[[], AbstractContextManager[Any]],
        base: BaseWeights,
        terms: Sequence[LocalTerm] = (),
    ) -> None:
        self.model = model
        self.trainable = trainable
        self.settings = settings
        self.terms = terms
        self.busy_seconds = 0.0
        self.jobs: dict[int, ServerJob] = {}
        self.served: dict[int, Served] = {}
        self.caches: dict[tuple[int, int], Cache] = {}
        self._autocast = autocast
        self._swap = ParameterSwap(model.model, trainable)
        self._base, self._changes = base, list[StoredTensors]()
        self._is_training: bool | None = None
        first = next(model.parameters())
        self._device, self._dtype = first.device, first.dtype
        self._width = int(model.model.config.hidden_size)
        self._handlers: dict[type[Message], Callable[[Any], Message | None]] = {
            OpenSlot: self._open_slot,
            HiddenState: self._hidden_state,
            Gradient: self._gradient,
            Step: self._step,
            CloseSlot: self._close_slot,
            Serve: self._serve,
            StopServing: self._stop_serving,
            SelectRows: self._select_rows,
            DropCache: self._drop_cache,
            ChangeBase: self._change_base,
            Report: lambda message: ServerReport(self.busy_seconds, peak_bytes()),
        }

    def handle(self, message: Message) -> Message | None:
        """Do what a message asks for.

        Returns:
            The answer, if the message has one.

        Raises:
            SplitError: If the message does not fit: another hidden size, an unknown client, a gradient of nothing.
        """
        handler = self._handlers.get(type(message))
        if handler is None:
            raise SplitError(f"unexpected message {type(message).__name__}")
        if isinstance(message, ClientMessage) and message.client >= self.settings.num_rows:
            raise SplitError(f"{_name(message)}: there are {self.settings.num_rows} clients")
        started = time.perf_counter()
        reply = handler(message)
        if getattr(message, "phase", "") == "train":
            self.busy_seconds += time.perf_counter() - started
        return reply

    def forget(self, clients: Iterable[int]) -> None:
        """Drop the training of clients whose process has ended."""
        for client in clients:
            self.jobs.pop(client, None)

    def _open_slot(self, message: OpenSlot) -> None:
        trainable = self._trainable_of(message)
        begin = message.state.part(list(trainable))
        parameters = new_parameters(trainable, begin)
        trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
        optimizer = self.settings.optimizer.build(trained) if trained else None
        streams = StreamPosition(training_seed(self.settings.seed, message.round_index, message.client))
        slot = LocalSlot(parameters, begin, optimizer, self.terms)
        self.jobs[message.client] = ServerJob(slot, streams, message.base, message.head_layers)

    def _close_slot(self, message: CloseSlot) -> Message | None:
        job = self.jobs.pop(message.client, None)
        if not message.keep:
            return None
        if job is None:
            raise SplitError(f"{_name(message)}: the client is not being trained")
        state = job.slot.state()
        where = message.client, message.round_index, message.phase
        return SlotClosed(*where, state.adapter, state.optimizer, state.tensors)

    def _serve(self, message: Serve) -> None:
        trainable = self._trainable_of(message)
        begin = SlotState({name: message.adapter[name] for name in trainable}, trains=())
        before = self.served.get(message.client)
        num_calls = 1 if before is None else before.num_calls + 1
        parameters = new_parameters(trainable, begin)
        self.served[message.client] = Served(parameters, message.base, message.head_layers, num_calls)

    def _stop_serving(self, message: StopServing) -> None:
        served = self.served.get(message.client)
        if served is None:
            raise SplitError(f"{_name(message)}: the client is not being evaluated")
        served.num_calls -= 1
        if not served.num_calls:
            del self.served[message.client]

    def _hidden_state(self, message: HiddenState) -> Message:
        for packed in message.hidden:
            if packed.shape[-1] != self._width:
                raise SplitError(
                    f"{_name(message)}: its hidden size is {packed.shape[-1]}, the body's is {self._width}"
                )
        outputs = self._train_forward(message) if message.training else self._evaluate(message)
        packed_outputs = tuple(pack(output, self.settings.hidden_dtype) for output in outputs)
        return HiddenReply(message.client, message.round_index, message.phase, message.number, packed_outputs)

    def _train_forward(self, message: HiddenState) -> list[Tensor]:
        job = self._job(message)
        self._set_mode(is_training=True)
        self._base.use(self._changes[: job.base])
        inputs = [self._unpack(packed).requires_grad_(message.needs_gradient) for packed in message.hidden]
        gradients = torch.set_grad_enabled(message.keeps_graph)
        with (
            self.model.at_depth(job.head_layers),
            self._swap.using(job.slot.parameters),
            self.model.streams.using(job.streams),
            self._autocast(),
            gradients,
        ):
            outputs = [self.model.body(hidden_BLD, message.mask) for hidden_BLD in inputs]
        if message.keeps_graph:
            job.graphs[message.number] = (inputs, outputs)
        return outputs

    @torch.no_grad()
    def _evaluate(self, message: HiddenState) -> list[Tensor]:
        if message.phase == "train":
            job = self._job(message)
            parameters, version, depth = job.slot.parameters, job.base, job.head_layers
        elif message.client in self.served:
            served = self.served[message.client]
            parameters, version, depth = served.parameters, served.base, served.head_layers
        else:
            raise SplitError(f"{_name(message)}: no adapter was sent for the client")
        self._set_mode(is_training=False)
        self._base.use(self._changes[:version])
        mask = None if message.mask is None else message.mask.to(self._device)
        cache = None if message.cache is None else self._cache(message.client, message.cache)
        lora = self.model.without_lora() if message.without_lora else nullcontext()
        with self.model.at_depth(depth), self._swap.using(parameters), self._autocast(), lora:
            return [
                self.model.serve_body(self._unpack(packed), mask, message.positions, cache) for packed in message.hidden
            ]

    def _gradient(self, message: Gradient) -> Message:
        job = self.jobs.get(message.client)
        if job is None or message.number not in job.graphs:
            raise SplitError(f"{_name(message)}: it belongs to forward pass {message.number}, which is unknown")
        inputs, outputs = job.graphs.pop(message.number)
        shapes = [list(packed.shape) for packed in message.gradient]
        if shapes != [list(output.shape) for output in outputs]:
            raise SplitError(f"{_name(message)}: its shapes {shapes} are not those of the forward pass")
        gradients = [self._unpack(g, o.dtype) for g, o in zip(message.gradient, outputs, strict=True)]
        with_graph = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad]
        if with_graph:
            torch.autograd.backward([o for o, _ in with_graph], [g for _, g in with_graph])
        found = tuple(
            pack(torch.zeros_like(h) if h.grad is None else h.grad, self.settings.gradient_dtype)
            for h in inputs
            if h.requires_grad
        )
        if message.learning_rate is not None:
            job.slot.before_backward(message.wants_norms, message.learning_rate)
        norms = job.slot.norms() if message.wants_norms else {}
        where = message.client, message.round_index, message.phase, message.number
        return GradientReply(*where, found, tuple(norms), torch.tensor(list(norms.values())) if norms else None)

    def _step(self, message: Step) -> None:
        job = self.jobs.get(message.client)
        if job is None:
            raise SplitError(f"{_name(message)}: the client is not being trained")
        job.slot.step(message.clip_factor, message.learning_rate)

    def _change_base(self, message: ChangeBase) -> None:
        if message.version == len(self._changes):
            self._changes.append(StoredTensors(dict(message.factors)))
        elif message.version > len(self._changes):
            raise SplitError(f"change {message.version} of the base comes before change {len(self._changes)}")

    def _trainable_of(self, message: OpenSlot | Serve) -> dict[str, nn.Parameter]:
        """The trainable parameters of the body of a client with such a head."""
        cut = self.model.cuts.get(message.head_layers)
        if cut is None:
            raise SplitError(
                f"{_name(message)}: a head of {message.head_layers} layers, expected {sorted(self.model.cuts)}"
            )
        return {name: p for name, p in self.trainable.items() if cut.part_of(name, self.model.arch) == "body"}

    def _job(self, message: HiddenState) -> ServerJob:
        if message.client not in self.jobs:
            raise SplitError(f"{_name(message)}: the client is not being trained")
        return self.jobs[message.client]

    def _cache(self, client: int, number: int) -> Cache:
        if (client, number) not in self.caches:
            self.caches[client, number] = self.model.new_cache()
        return self.caches[client, number]

    def _select_rows(self, message: SelectRows) -> None:
        source = self._cache(message.client, message.source)
        if message.target != message.source:
            source = self.caches[message.client, message.target] = self.model.copy_cache(source)
        if message.rows is not None:
            self._check_rows(message, message.rows, source)
            source.batch_select_indices(message.rows.to(self._device))

    def _check_rows(self, message: SelectRows, rows: Tensor, cache: Cache) -> None:
        """Rows are positions in the cache's batch and cannot be anything else, such as token ids."""
        keys: Any = cache.layers[max(self.model.cuts)]  # in the body of every client
        num_rows = len(keys.keys) if keys.is_initialized else 0
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < num_rows:
            raise SplitError(f"{_name(message)}: its rows are not positions in a batch of {num_rows}")

    def _drop_cache(self, message: DropCache) -> None:
        self.caches.pop((message.client, message.cache), None)

    def _set_mode(self, is_training: bool) -> None:
        if self._is_training != is_training:
            self.model.train(is_training)
            self._is_training = is_training

    def _unpack(self, packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
        return unpack(packed, dtype or self._hidden_dtype(packed), self._device).detach()

    def _hidden_dtype(self, packed: Packed) -> torch.dtype:
        """The head's own type, so that nothing is lost; packed ones come back in the body's type."""
        is_plain = packed.scale is None and self.settings.hidden_dtype == "float32"
        return packed.codes.dtype if is_plain else self._dtype


def _name(message: ClientMessage) -> str:
    return f"{type(message).__name__} of client {message.client} in round {message.round_index}"
