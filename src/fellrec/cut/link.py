"""The clients' side of the connection to the body server: every message is recorded in the ledger."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fellrec.cut.messages import (
    ClientMessage,
    DropCache,
    Gradient,
    GradientReply,
    HiddenReply,
    HiddenState,
    Report,
    SelectRows,
    ServerReport,
)
from fellrec.cut.noise import CutNoise, Disturbance
from fellrec.cut.server import BodyServer
from fellrec.distributed.channel import Channel
from fellrec.distributed.memory import peak_bytes
from fellrec.distributed.message import Message
from fellrec.errors import SplitError
from fellrec.federated.ledger import Ledger
from fellrec.functional.packing import pack, unpack

_MAX_PROCESSES = 2**20
"""More than a job has: a cache's number is that of its process and one of its own."""


class Transport(Protocol):
    """Moves messages to the server and its answers back.

    Attributes:
        process: Number of this client process.
    """

    process: int

    def send(self, message: Message) -> None:
        """Send a message; an answer, if it has one, is for `receive`."""

    def receive(self) -> Message:
        """Wait for the next answer."""


class InProcess:
    """Server and clients in one process: a message is a call.

    Args:
        server: Answers at once.
    """

    process = 0

    def __init__(self, server: BodyServer) -> None:
        self.server = server
        self._answers: deque[Message] = deque()

    def send(self, message: Message) -> None:
        """Let the server handle the message now."""
        answer = self.server.handle(message)
        if answer is not None:
            self._answers.append(answer)

    def receive(self) -> Message:
        """The oldest answer that was not yet received."""
        return self._answers.popleft()


class OverChannel:
    """A client process's connection to the server process.

    Args:
        channel: Of this process.
        server: Number of the server process.
    """

    def __init__(self, channel: Channel, server: int) -> None:
        self.channel = channel
        self.server = server
        self.process = channel.process

    def send(self, message: Message) -> None:
        """See ``Transport``."""
        if isinstance(message, ClientMessage):
            self.channel.activity = f", in round {message.round_index}, client {message.client}"
        self.channel.send(self.server, message)

    def receive(self) -> Message:
        """See ``Transport``."""
        return self.channel.receive(self.server)


@dataclass(frozen=True)
class _Call:
    """The client that the model's calls of the body are for."""

    client: int
    round_index: int
    phase: str


class ServerLink:
    """Sends the model's hidden states and their gradients to the body server.

    Args:
        hidden_dtype: Packing of hidden states, see ``fellrec.functional.packing``.
        gradient_dtype: Packing of gradients.
        trains_body: Whether the server trains something.
        noise: What is done to both before they are packed.

    Attributes:
        waited_seconds: Time that training spent in the transport: sending, and waiting for the server. In one process
            the server's work is part of it.
        wants_norms: Whether the next gradient is the last of an optimiser step that is going to be clipped.
        learning_rate: Of that step, if local terms need it; ``None`` otherwise.
        norms: Norms of the body's gradients that came with it, by parameter.
    """

    def __init__(
        self,
        hidden_dtype: str = "float32",
        gradient_dtype: str = "float32",
        trains_body: bool = True,
        noise: CutNoise | None = None,
    ) -> None:
        self.hidden_dtype = hidden_dtype
        self.gradient_dtype = gradient_dtype
        self.trains_body = trains_body
        self.noise = noise or CutNoise()
        self.ledger = Ledger()
        self._transport: Transport | None = None
        self.waited_seconds = 0.0
        self.wants_norms = False
        self.learning_rate: float | None = None
        self.norms: dict[str, float] = {}
        self._call: _Call | None = None
        self._num_sent = 0
        self._without_lora = False
        self._number = 0
        self._num_caches = 0
        self._before = {"busy_seconds": 0.0, "waited_seconds": 0.0}

    def connect(self, transport: Transport, ledger: Ledger) -> None:
        """Use a transport for the next run, whose ledger records what crosses."""
        self._transport, self.ledger = transport, ledger
        self.waited_seconds = 0.0
        self._before = {"busy_seconds": 0.0, "waited_seconds": 0.0}

    @property
    def transport(self) -> Transport:
        """The transport of the current run."""
        assert self._transport is not None, "the link is connected when a run is built"
        return self._transport

    def send(self, message: Message) -> None:
        """Record and send a message."""
        self._record(message)
        started = time.perf_counter()
        self.transport.send(message)
        self._add_time(message, started)

    def request(self, message: Message) -> Any:
        """Send a message and wait for its answer."""
        self.send(message)
        started = time.perf_counter()
        answer = self.transport.receive()
        self._add_time(message, started)
        self._record(answer)
        return answer

    @contextmanager
    def on_behalf_of(self, client: int, round_index: int, phase: str) -> Iterator[None]:
        """While this lasts, the model's calls of the body are for this client.

        Args:
            client: Row of the population.
            round_index: For the ledger.
            phase: ``"train"``, ``"val"`` or ``"test"``.
        """
        before = self._call, self._num_sent
        self._call, self._num_sent = _Call(client, round_index, phase), 0
        try:
            yield
        finally:
            self._call, self._num_sent = before

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        """See ``fellrec.models.remote.BodyLink``."""
        self._without_lora = True
        try:
            yield
        finally:
            self._without_lora = False

    def run_body(self, hidden: Tensor, mask: Tensor | None, positions: str, cache: int | None) -> Tensor:
        """See ``fellrec.models.remote.BodyLink``."""
        answer, _ = self._forward(
            (hidden,),
            mask=None if mask is None else mask.bool(),
            positions=positions,
            without_lora=self._without_lora,
            cache=cache,
        )
        return unpack(answer.hidden[0], hidden.dtype, hidden.device)

    def forward(self, hidden: tuple[Tensor, ...], keeps_graph: bool, needs_gradient: bool) -> tuple[Any, Any]:
        """See ``fellrec.models.remote.BodyLink``."""
        answer, handle = self._forward(hidden, training=True, keeps_graph=keeps_graph, needs_gradient=needs_gradient)
        outputs = zip(answer.hidden, hidden, strict=True)
        return tuple(unpack(packed, head.dtype, head.device) for packed, head in outputs), handle

    def backward(self, handle: Any, gradients: tuple[Tensor, ...], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """See ``fellrec.models.remote.BodyLink``."""
        call, number = handle
        sent = self._disturbed(self.noise.gradient, gradients, call)
        packed = tuple(pack(gradient, self.gradient_dtype) for gradient in sent)
        where = call.client, call.round_index, call.phase, number
        reply = self.request(Gradient(*where, packed, self.wants_norms, self.learning_rate))
        if not isinstance(reply, GradientReply) or reply.number != number:
            raise SplitError(f"unexpected message {type(reply).__name__} for a gradient of client {call.client}")
        self.norms = {} if reply.norms is None else dict(zip(reply.names, reply.norms.tolist(), strict=True))
        return tuple(unpack(g, head.dtype, head.device) for g, head in zip(reply.gradient, like))

    def new_cache(self) -> int:
        """See ``fellrec.models.remote.BodyLink``."""
        self._num_caches += 1
        return self._num_caches * _MAX_PROCESSES + self.transport.process

    def select_rows(self, source: int, target: int, rows: Tensor | None) -> None:
        """See ``fellrec.models.remote.BodyLink``."""
        call, rows = self._current, None if rows is None else rows.long()
        self.send(SelectRows(call.client, call.round_index, call.phase, source, target, rows))

    def drop_cache(self, cache: int) -> None:
        """See ``fellrec.models.remote.BodyLink``."""
        call = self._current
        self.send(DropCache(call.client, call.round_index, call.phase, cache))

    def costs(self, seconds: float) -> Mapping[str, float]:
        """How busy both sides were in a round that took so many seconds, and their memory."""
        report = self.request(Report())
        assert isinstance(report, ServerReport)
        now = {"busy_seconds": report.busy_seconds, "waited_seconds": self.waited_seconds}
        took = {name: value - self._before[name] for name, value in now.items()}
        self._before = now
        busy, waited = took["busy_seconds"], took["waited_seconds"]
        return {
            "cost/server/busy_seconds": busy,
            "cost/server/busy_rate": _fraction(busy, seconds),
            "cost/server/peak_bytes": float(report.peak_bytes),
            "cost/client/waited_seconds": waited,
            "cost/client/busy_seconds": max(0.0, seconds - waited),
            "cost/client/busy_rate": _fraction(seconds - waited, seconds),
            "cost/client/peak_bytes": float(peak_bytes()),
        }

    def _forward(self, hidden: tuple[Tensor, ...], **how: Any) -> tuple[HiddenReply, Any]:
        call = self._current
        self._number += 1
        packed = tuple(pack(head, self.hidden_dtype) for head in self._disturbed(self.noise.hidden, hidden, call))
        answer = self.request(HiddenState(call.client, call.round_index, call.phase, self._number, packed, **how))
        if not isinstance(answer, HiddenReply) or answer.number != self._number:
            raise SplitError(f"unexpected message {type(answer).__name__} for a hidden state of client {call.client}")
        return answer, (call, self._number)

    def _disturbed(self, change: Disturbance, tensors: tuple[Tensor, ...], call: _Call) -> tuple[Tensor, ...]:
        """Tensors of one message with noise of their own: by client, round, phase, and their number in it.

        Several processes may evaluate users of one client; they must not repeat each other's noise.
        """
        self._num_sent += 1
        process = 0 if call.phase == "train" else self.transport.process
        where = call.client, call.round_index, call.phase, process, self._num_sent
        return tuple(change(tensor, *where, place) for place, tensor in enumerate(tensors))

    def _record(self, message: Message) -> None:
        if isinstance(message, ClientMessage):
            direction = "up" if message.to_server else "down"
            for kind, num_bytes in message.sizes().items():
                self.ledger.add(message.client, message.round_index, message.phase, direction, kind, num_bytes)

    def _add_time(self, message: Message, started: float) -> None:
        if getattr(message, "phase", "") == "train":
            self.waited_seconds += time.perf_counter() - started

    @property
    def _current(self) -> _Call:
        assert self._call is not None, "the body is called on behalf of a client"
        return self._call


def _fraction(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0
