"""The way between clients and server: one object moves every message and books it in the ledger."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fellrec.cut.messages import DropCache, HiddenReply, HiddenState, Message, SelectRows
from fellrec.cut.server import BodyServer
from fellrec.errors import SplitError
from fellrec.federated.ledger import Ledger
from fellrec.functional.packing import pack, unpack


class Transport(Protocol):
    """Moves messages to the server and its answers back."""

    def send(self, message: Message) -> None:
        """Send a message; an answer, if it has one, is for `receive`."""

    def receive(self) -> Message:
        """Wait for the next answer."""


class Nowhere:
    """Stands for a transport before there is one."""

    def send(self, message: Message) -> None:
        """Refuse."""
        raise AssertionError("the link is not connected; build_loop does that")

    def receive(self) -> Message:
        """Refuse."""
        raise AssertionError("the link is not connected; build_loop does that")


class InProcess:
    """Server and clients in one process: a message is a call.

    Args:
        server: Answers at once.
    """

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


@dataclass(frozen=True)
class _Call:
    """On whose behalf the client's model calls the body while nothing is trained."""

    client: int
    round_index: int
    phase: str
    bank: str


class ServerLink:
    """The clients' side of the transport.

    Args:
        transport: To the server.
        ledger: Books what crosses.
        hidden_dtype: Packing of hidden states, see ``fellrec.functional.packing``.

    Attributes:
        waited_seconds: Time spent in the transport: sending, and waiting for the server. In one process the server's
            work is part of it.
    """

    def __init__(self, transport: Transport, ledger: Ledger, hidden_dtype: str = "float32") -> None:
        self.transport = transport
        self.ledger = ledger
        self.hidden_dtype = hidden_dtype
        self.waited_seconds = 0.0
        self._call: _Call | None = None
        self._without_lora = False
        self._tickets = 0

    def send(self, message: Message) -> None:
        """Book and send a message."""
        self.ledger.book(message)
        started = time.perf_counter()
        self.transport.send(message)
        self.waited_seconds += time.perf_counter() - started

    def receive(self) -> Message:
        """Wait for the next answer and book it."""
        started = time.perf_counter()
        message = self.transport.receive()
        self.waited_seconds += time.perf_counter() - started
        self.ledger.book(message)
        return message

    def request(self, message: Message) -> Message:
        """Send a message and wait for its answer; nothing else may be under way."""
        self.send(message)
        return self.receive()

    @contextmanager
    def on_behalf_of(self, client: int, round_index: int, phase: str, bank: str) -> Iterator[None]:
        """While this lasts, the model's calls of the body are for this client's evaluation.

        Args:
            client: Row of the adapters.
            round_index: For the ledger.
            phase: ``"val"`` or ``"test"``.
            bank: ``"current"``, ``"best"`` or ``"best_per_client"``.
        """
        self._call = _Call(client, round_index, phase, bank)
        try:
            yield
        finally:
            self._call = None

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
        call = self._current
        self._tickets += 1
        answer = self.request(
            HiddenState(
                client=call.client,
                round_index=call.round_index,
                phase=call.phase,
                ticket=self._tickets,
                hidden=(pack(hidden, self.hidden_dtype),),
                mask=None if mask is None else mask.bool(),
                positions=positions,
                needs_gradient=False,
                bank=call.bank,
                without_lora=self._without_lora,
                cache=cache,
            )
        )
        if not isinstance(answer, HiddenReply) or answer.ticket != self._tickets:
            raise SplitError(f"the server answered a hidden state of client {call.client} with {type(answer).__name__}")
        return unpack(answer.hidden[0], hidden.dtype, hidden.device)

    def select_rows(self, source: int, target: int, rows: Tensor | None) -> None:
        """See ``fellrec.models.remote.BodyLink``."""
        call, rows = self._current, None if rows is None else rows.long()
        self.send(SelectRows(call.client, call.round_index, call.phase, source, target, rows))

    def drop_cache(self, cache: int) -> None:
        """See ``fellrec.models.remote.BodyLink``."""
        call = self._current
        self.send(DropCache(call.client, call.round_index, call.phase, cache))

    @property
    def _current(self) -> _Call:
        assert self._call is not None, "outside of training the body is called on behalf of a client"
        return self._call
