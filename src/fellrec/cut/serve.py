"""The process of the body server: answers all client processes until the command is over."""

from __future__ import annotations

from collections.abc import Callable

from fellrec.cut.messages import ClientMessage, CloseSlot, OpenSlot
from fellrec.cut.server import BodyServer
from fellrec.distributed.channel import Channel, PeerGoneError
from fellrec.distributed.message import Done, Message, Stop, reading
from fellrec.errors import SplitError
from fellrec.pool.messages import Begin
from fellrec.pool.pool import COORDINATOR


def serve(channel: Channel, begin: Callable[[Begin], tuple[BodyServer, Message]], skips: bool) -> None:
    """Answer the client processes until the coordinator ends the command.

    Args:
        channel: Of the server's process.
        begin: Makes the server of a run, and the answer to the message that begins it.
        skips: Whether the run continues without a client process that has ended.

    Raises:
        SplitError: If a process has ended that cannot be missed, or sends something unexpected.
    """
    clients_of: dict[int, set[int]] = {}
    server: BodyServer | None = None
    while True:
        try:
            process, message = channel.receive_any()
            if isinstance(message, Stop):
                channel.send(process, Done())
                return
            if isinstance(message, Begin):
                server, reply = begin(message)
                channel.send(process, reply)
                continue
            if server is None:
                raise SplitError(f"unexpected message {type(message).__name__} before a run has begun")
            if isinstance(message, ClientMessage):
                channel.activity = f", in round {message.round_index}, client {message.client}"
            if isinstance(message, OpenSlot):
                clients_of.setdefault(process, set()).add(message.client)
            with reading(message):
                answer = server.handle(message)
            if isinstance(message, CloseSlot):
                clients_of.get(process, set()).discard(message.client)
            if answer is not None:
                channel.send(process, answer)
        except PeerGoneError as error:  # while waiting for a message, or while answering one
            if error.process == COORDINATOR or not skips:
                raise
            if server is not None:
                server.forget(clients_of.pop(error.process, set()))
