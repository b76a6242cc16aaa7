"""Messages between processes, over ``torch.distributed`` point-to-point."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fellrec.cut.messages import PROTOCOL_VERSION, Abort, Message, decode, encode
from fellrec.errors import SplitError

_FRAME = 512
"""Bytes of the frame that announces a message; a longer header follows in a second one."""
_LARGEST_HEADER = 1 << 24
_MEETING_SECONDS = 120.0
"""Processes are waited for at least so long at the start: one may have more to import, or to pre-train."""
_LINGER_SECONDS = 1.0
"""A process that ends with something unread breaks its lines at once, and what it just sent is lost."""
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool)
}


class PeerGoneError(SplitError):
    """Another process is gone or silent.

    Attributes:
        rank: Of that process.
    """

    def __init__(self, rank: int, text: str) -> None:
        super().__init__(text)
        self.rank = rank


class AbortedError(SplitError):
    """Another process gave up, and said why."""


def role_name(rank: int) -> str:
    """How messages call a process of the executed cut."""
    return f"rank {rank} ({'the server' if rank == 0 else 'a client process'})"


def rank_name(rank: int) -> str:
    """How messages call one of several like processes."""
    return f"rank {rank}"


@dataclass(frozen=True)
class Naming:
    """How error messages call things.

    Attributes:
        peer: A process, by its rank.
        timeout: The setting that bounds a silence.
    """

    peer: Callable[[int], str] = role_name
    timeout: str = "split.timeout_seconds"


class Wire:
    """One process's ends of the lines to its peers. A thread per peer receives, so that sending never deadlocks.

    Every quarter of the timeout each side shows that it is alive; a peer that closes its line or stays silent for the
    timeout is reported to whoever waits for it.

    Args:
        rank: Of this process.
        world_size: Number of processes.
        init_method: Where they meet, such as ``tcp://127.0.0.1:29500``.
        timeout_seconds: Longest silence.
        device: Where tensors are put when they arrive; on CUDA, tensors travel by NCCL, headers by gloo.
        naming: Of processes and settings in error messages.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        init_method: str,
        timeout_seconds: float,
        device: torch.device,
        naming: Naming = Naming(),
    ) -> None:
        self.naming = naming
        self.rank, self.world_size, self.timeout_seconds, self.device = rank, world_size, timeout_seconds, device
        timeout, patience = timedelta(seconds=timeout_seconds), max(timeout_seconds, _MEETING_SECONDS)
        try:
            dist.init_process_group(
                "gloo", init_method=init_method, rank=rank, world_size=world_size, timeout=timedelta(seconds=patience)
            )
        except Exception as error:  # the store raises several types
            raise SplitError(
                f"rank {rank}: not all {world_size} processes met at {init_method} within {patience:g} s "
                f"({naming.timeout}): {str(error).splitlines()[0]}"
            ) from error
        self._group = dist.new_group(timeout=timeout)
        self._payload_group = dist.new_group(backend="nccl", timeout=timeout) if device.type == "cuda" else None
        self._peers: tuple[int, ...] = ()
        self._arrived: list[tuple[int, Message | BaseException]] = []
        self._news = threading.Condition()
        self._locks = {peer: threading.Lock() for peer in range(world_size)}
        self.gone: set[int] = set()
        """Peers that are gone or silent."""
        self._is_open = True
        self.where = ""
        """What this process is doing, for error messages."""

    def listen(self, peers: Iterable[int]) -> None:
        """Begin to receive from these ranks."""
        self._peers = tuple(peers)
        for peer in self._peers:
            threading.Thread(target=self._receive_all, args=(peer,), daemon=True, name=f"from-{peer}").start()
        threading.Thread(target=self._show_life, daemon=True, name="alive").start()

    def send(self, peer: int, message: Message) -> None:
        """Send a message.

        Raises:
            PeerGoneError: If the peer is gone, or does not take it within the timeout.
            SplitError: If a peer aborted meanwhile.
        """
        header, tensors = encode(message)
        header["tensors"] = [[str(t.dtype).removeprefix("torch."), list(t.shape)] for t in tensors]
        try:
            with self._locks[peer]:
                self._send_frames(peer, json.dumps(header).encode())
                for tensor in tensors:
                    self._send_tensor(peer, tensor)
        except RuntimeError as error:
            raise self._reason() or self._gone_error(peer, error) from error

    def receive(self, peer: int) -> Message:
        """Wait for the next message of one peer.

        Raises:
            PeerGoneError: If the peer is gone or silent.
            SplitError: If it aborted, or what it sent cannot be read.
        """
        return self._take(lambda sender: sender == peer)[1]

    def receive_any(self) -> tuple[int, Message]:
        """Wait for the next message of any peer; gives its rank too. Raises as ``receive`` does."""
        return self._take(lambda sender: True)

    @property
    def has_pending(self) -> bool:
        """Whether something has arrived that was not received yet."""
        with self._news:
            return bool(self._arrived)

    def check(self) -> None:
        """Raise at once what waits to be received: that a peer is gone, or gave up."""
        with self._news:
            bad = [i for i, (_, content) in enumerate(self._arrived) if isinstance(content, (BaseException, Abort))]
            if not bad:
                return
            peer, content = self._arrived.pop(bad[0])
            self._arrived.insert(0, (peer, content))
        self.receive(peer)

    def abort(self, reason: str) -> None:
        """Tell all peers, as far as they can be reached, that this process gives up, and let them hear it."""
        for peer in self._peers:
            if peer not in self.gone:
                try:
                    self.send(peer, Abort(reason))
                except SplitError:
                    continue
        time.sleep(_LINGER_SECONDS)

    def close(self) -> None:
        """The run is over: peers may leave from now on. The process group lives until the process ends."""
        self._is_open = False

    def _take(self, is_wanted: Callable[[int], bool]) -> tuple[int, Message]:
        """The first arrival from a wanted peer."""
        with self._news:
            while (place := next((i for i, (peer, _) in enumerate(self._arrived) if is_wanted(peer)), None)) is None:
                self._news.wait()
            peer, content = self._arrived.pop(place)
        if isinstance(content, BaseException):
            raise content
        if isinstance(content, Abort):
            raise AbortedError(content.reason)
        return peer, content

    def _reason(self) -> SplitError | None:
        """Why a peer gave up, or cannot be understood, if it said something."""
        with self._news:
            for _, content in self._arrived:
                if isinstance(content, Abort):
                    return AbortedError(content.reason)
                if isinstance(content, SplitError) and not isinstance(content, PeerGoneError):
                    return content
        return None

    def _receive_all(self, peer: int) -> None:
        while True:
            try:
                message = self._receive(peer)
            except SplitError as error:
                self._put(peer, error)
                return
            except RuntimeError as error:
                if self._is_open:
                    self._put(peer, self._gone_error(peer, error))
                return
            if message is not None:
                self._put(peer, message)

    def _put(self, peer: int, content: Message | BaseException) -> None:
        with self._news:
            self._arrived.append((peer, content))
            self._news.notify_all()

    def _receive(self, peer: int) -> Message | None:
        frame = torch.zeros(_FRAME, dtype=torch.uint8)
        dist.recv(frame, src=peer, group=self._group)
        version, length = (int(value) for value in frame[:16].view(torch.int64))
        if version != PROTOCOL_VERSION or not 0 <= length <= _LARGEST_HEADER:
            raise SplitError(
                f"rank {peer} speaks protocol version {version}, rank {self.rank} speaks {PROTOCOL_VERSION}"
            )
        if length == 0:
            return None
        content = frame[16:]
        if length > len(content):
            rest = torch.zeros(length - len(content), dtype=torch.uint8)
            dist.recv(rest, src=peer, group=self._group)
            content = torch.cat([content, rest])
        header = json.loads(bytes(content[:length].tolist()))
        tensors = [self._receive_tensor(peer, dtype, shape) for dtype, shape in header["tensors"]]
        return decode(header, tensors)

    def _send_frames(self, peer: int, header: bytes) -> None:
        frame = torch.zeros(_FRAME, dtype=torch.uint8)
        frame[:16] = torch.tensor([PROTOCOL_VERSION, len(header)], dtype=torch.int64).view(torch.uint8)
        first, rest = header[: _FRAME - 16], header[_FRAME - 16 :]
        if first:
            frame[16 : 16 + len(first)] = torch.frombuffer(bytearray(first), dtype=torch.uint8)
        dist.send(frame, dst=peer, group=self._group)
        if rest:
            dist.send(torch.frombuffer(bytearray(rest), dtype=torch.uint8), dst=peer, group=self._group)

    def _send_tensor(self, peer: int, tensor: Tensor) -> None:
        if tensor.numel():
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            dist.send(flat.to(self.device), dst=peer, group=self._payload_group or self._group)

    def _receive_tensor(self, peer: int, dtype: str, shape: list[int]) -> Tensor:
        if dtype not in _DTYPES:
            raise SplitError(f"rank {peer} sent a tensor of the unknown type {dtype}")
        tensor = torch.empty(shape, dtype=_DTYPES[dtype], device=self.device)
        if tensor.numel():
            dist.recv(tensor.view(-1).view(torch.uint8), src=peer, group=self._payload_group or self._group)
        return tensor

    def _show_life(self) -> None:
        while self._is_open:
            time.sleep(self.timeout_seconds / 4)
            for peer in self._peers:
                if self._is_open and peer not in self.gone and self._locks[peer].acquire(blocking=False):
                    try:
                        self._send_frames(peer, b"")
                    except RuntimeError:
                        self.gone.add(peer)
                    finally:
                        self._locks[peer].release()

    def _gone_error(self, peer: int, error: BaseException) -> PeerGoneError:
        self.gone.add(peer)
        is_silent = any(word in str(error).lower() for word in ("timed out", "timeout"))
        what = f"was silent for {self.timeout_seconds:g} s ({self.naming.timeout})" if is_silent else "is gone"
        return PeerGoneError(peer, f"rank {self.rank}: {self.naming.peer(peer)} {what}{self.where}")


class ToServer:
    """The transport of a client process: its line to rank 0.

    Args:
        wire: Of this process.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire

    def send(self, message: Message) -> None:
        """See ``Transport``."""
        self._remember(message)
        self.wire.send(0, message)

    def receive(self) -> Message:
        """See ``Transport``."""
        return self.wire.receive(0)

    def _remember(self, message: Any) -> None:
        client, round_index = getattr(message, "client", None), getattr(message, "round_index", None)
        if client is not None:
            self.wire.where = f", in round {round_index}, client {client}"
