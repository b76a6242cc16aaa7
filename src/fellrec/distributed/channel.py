"""Messages between processes, over ``torch.distributed`` point-to-point."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fellrec.distributed.memory import total_bytes
from fellrec.distributed.message import (
    LARGEST_HEADER,
    PROTOCOL_VERSION,
    Abort,
    Message,
    TensorSpec,
    decode,
    encode,
    header_of,
    read_header,
    spec_bytes,
)
from fellrec.distributed.secret import Identity, Impostor
from fellrec.errors import SplitError

CPU = torch.device("cpu")

_FRAME = 512
"""Bytes of the frame that announces a message; a longer header follows in a second one."""
_LINGER_SECONDS = 1.0
"""A process that ends with unread messages breaks its connections at once, and what it just sent is lost."""


class PeerGoneError(SplitError):
    """Another process has ended, or does not answer.

    Attributes:
        process: Its number.
    """

    def __init__(self, process: int, text: str) -> None:
        super().__init__(text)
        self.process = process


class AbortedError(SplitError):
    """Another process ended the run and sent the reason."""


@dataclass(frozen=True)
class Naming:
    """How error messages call processes and settings.

    Attributes:
        process: A process, by its number.
        timeout: The setting that limits the time without a message.
    """

    process: Callable[[int], str] = lambda number: f"process {number}"
    timeout: str = "trainer.timeout_seconds"


class Channel:
    """One process's connections to others, over ``torch.distributed`` point-to-point.

    A thread for each other process receives, so sending never deadlocks. Every quarter of the timeout each side sends
    an empty message; a process that closes its connection or sends nothing for the timeout is reported to whoever waits
    for it, and so is one that sends what cannot be read. Before the first message both sides prove that they know the
    run's secret. The default process group must exist, see ``fabric.launch``.

    Args:
        process: Number of this process.
        num_processes: Processes of the run.
        timeout_seconds: Longest time without a message.
        secret: Of the run, see `shared_secret`.
        device: Where tensors are put when they arrive; on CUDA, tensors are sent by NCCL and headers by gloo.
        naming: Of processes and settings in error messages.
    """

    def __init__(
        self,
        process: int,
        num_processes: int,
        timeout_seconds: float,
        secret: bytes,
        device: torch.device = CPU,
        naming: Naming = Naming(),
    ) -> None:
        self.naming = naming
        self._identity = Identity(process, secret)
        self.process, self.num_processes = process, num_processes
        self.timeout_seconds, self.device = timeout_seconds, device
        timeout = timedelta(seconds=timeout_seconds)
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._payload_group = dist.new_group(backend="nccl", timeout=timeout) if device.type == "cuda" else None
        self._others: tuple[int, ...] = ()
        self._arrived: list[tuple[int, Message | BaseException]] = []
        self._ended: dict[int, BaseException] = {}
        self._pending = threading.Condition()
        self._locks = {other: threading.Lock() for other in range(num_processes)}
        self.gone: set[int] = set()
        """Processes that have ended or do not answer."""
        self._is_open = True
        self.activity = ""
        """What this process is doing, for error messages."""

    def listen(self, others: Iterable[int]) -> None:
        """Begin to receive from these processes, each of which must know the run's secret.

        Raises:
            PeerGoneError: If one has ended or does not answer.
            SplitError: If one has another protocol version, or does not know the secret.
        """
        for other in sorted(others):  # in an order in which no two pairs wait for each other
            self._meet(other)
        self._others = tuple(others)
        for other in self._others:
            threading.Thread(target=self._receive_all, args=(other,), daemon=True, name=f"from-{other}").start()
        threading.Thread(target=self._send_heartbeats, daemon=True, name="heartbeat").start()

    def send(self, other: int, message: Message) -> None:
        """Send a message.

        Raises:
            PeerGoneError: If the other process has ended, or does not take it within the timeout.
            SplitError: If another process aborted meanwhile.
        """
        plain, tensors = encode(message)
        header = header_of(plain, tensors)
        if len(header) > LARGEST_HEADER:
            raise SplitError(f"{type(message).__name__} is too large: its header has {len(header)} bytes")
        payload = _join(tensors, self.device)
        try:
            with self._locks[other]:
                self._send_frames(other, header)
                if payload.numel():
                    dist.send(payload, dst=other, group=self._payload_group or self._group)
        except RuntimeError as error:
            raise self._reason() or self._gone_error(other, error) from error

    def receive(self, other: int) -> Message:
        """Wait for the next message of one other process.

        Raises:
            PeerGoneError: If it has ended or does not answer.
            SplitError: If it aborted, or what it sent cannot be read.
        """
        return self._take(lambda sender: sender == other)[1]

    def receive_any(self) -> tuple[int, Message]:
        """Wait for the next message of any process; gives its number too. Raises as ``receive`` does."""
        return self._take(lambda sender: True)

    @property
    def has_pending(self) -> bool:
        """Whether something has arrived that was not received yet."""
        with self._pending:
            return bool(self._arrived)

    def check(self) -> None:
        """Raise at once if another process has ended or aborted, without waiting for a message."""
        with self._pending:
            bad = [i for i, (_, content) in enumerate(self._arrived) if isinstance(content, (BaseException, Abort))]
            if not bad:
                return
            other, content = self._arrived.pop(bad[0])
            self._arrived.insert(0, (other, content))
        self.receive(other)

    def abort(self, reason: str) -> None:
        """Send the reason why this process ends to all others that can be reached."""
        for other in self._others:
            if other not in self.gone:
                try:
                    self.send(other, Abort(reason))
                except SplitError:
                    continue
        time.sleep(_LINGER_SECONDS)

    def close(self) -> None:
        """The run is over: others may end from now on. The process group lives until the process ends."""
        self._is_open = False

    def _take(self, is_wanted: Callable[[int], bool]) -> tuple[int, Message]:
        """The first arrival from a wanted process."""
        with self._pending:
            while (place := next((i for i, (other, _) in enumerate(self._arrived) if is_wanted(other)), None)) is None:
                if all(other in self._ended for other in self._others if is_wanted(other)):  # nothing more can come
                    raise next(error for other, error in self._ended.items() if is_wanted(other))
                self._pending.wait()
            other, content = self._arrived.pop(place)
        if isinstance(content, BaseException):
            raise content
        if isinstance(content, Abort):
            raise AbortedError(content.reason)
        return other, content

    def _reason(self) -> SplitError | None:
        """Why another process aborted or cannot be understood, if that is known."""
        with self._pending:
            for _, content in self._arrived:
                if isinstance(content, Abort):
                    return AbortedError(content.reason)
                if isinstance(content, SplitError) and not isinstance(content, PeerGoneError):
                    return content
        return None

    def _meet(self, other: int) -> None:
        """Exchange proofs with another process; the one with the lower number speaks first."""
        name = self.naming.process(other)
        try:
            version, challenge = self._exchange(other, PROTOCOL_VERSION, self._identity.challenge())
            if version != PROTOCOL_VERSION:
                raise self._version_error(other, version)
            _, proof = self._exchange(other, PROTOCOL_VERSION, self._identity.proof(other, challenge))
            self._identity.check(other, proof)
        except Impostor as error:
            raise SplitError(f"{name} {error}") from error
        except RuntimeError as error:
            raise self._gone_error(other, error) from error

    def _exchange(self, other: int, version: int, content: bytes) -> tuple[int, bytes]:
        """Send a few bytes and receive as many."""
        own, theirs = torch.zeros(_FRAME, dtype=torch.uint8), torch.zeros(_FRAME, dtype=torch.uint8)
        own[:8] = torch.tensor([version], dtype=torch.int64).view(torch.uint8)
        own[8 : 8 + len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        for is_turn_to_send in (self.process < other, self.process > other):
            if is_turn_to_send:
                dist.send(own, dst=other, group=self._group)
            else:
                dist.recv(theirs, src=other, group=self._group)
        return int(theirs[:8].view(torch.int64)), bytes(theirs[8 : 8 + len(content)].tolist())

    def _receive_all(self, other: int) -> None:
        while True:
            try:
                message = self._receive(other)
            except SplitError as error:
                self._end(other, error)
                return
            except RuntimeError as error:
                self._end(other, self._gone_error(other, error) if self._is_open else error)
                return
            except BaseException as error:  # whoever waits for this process must not wait for ever
                self._end(other, SplitError(f"{self.naming.process(other)} sent a malformed message: {error}"))
                return
            if message is not None:
                self._put(other, message)

    def _put(self, other: int, content: Message | BaseException) -> None:
        with self._pending:
            self._arrived.append((other, content))
            self._pending.notify_all()

    def _end(self, other: int, error: BaseException) -> None:
        """Nothing more is received from a process."""
        with self._pending:
            self._ended[other] = error
        if self._is_open:
            self._put(other, error)

    def _receive(self, other: int) -> Message | None:
        frame = torch.zeros(_FRAME, dtype=torch.uint8)
        dist.recv(frame, src=other, group=self._group)
        version, length = (int(value) for value in frame[:16].view(torch.int64))
        name = self.naming.process(other)
        if version != PROTOCOL_VERSION:
            raise self._version_error(other, version)
        if not 0 <= length <= LARGEST_HEADER:
            raise SplitError(f"{name} sent a malformed message: its header has {length} bytes")
        if length == 0:
            return None
        content = frame[16:]
        if length > len(content):
            rest = torch.zeros(length - len(content), dtype=torch.uint8)
            dist.recv(rest, src=other, group=self._group)
            content = torch.cat([content, rest])
        try:
            plain, specs = read_header(content[:length].numpy().tobytes(), total_bytes())
            return decode(plain, self._receive_tensors(other, specs))
        except SplitError as error:
            raise SplitError(f"{name} sent a {error}" if str(error).startswith("malformed") else str(error)) from error

    def _version_error(self, other: int, version: int) -> SplitError:
        return SplitError(
            f"{self.naming.process(other)} has protocol version {version}, {self.naming.process(self.process)} has "
            f"{PROTOCOL_VERSION}"
        )

    def _send_frames(self, other: int, header: bytes) -> None:
        frame = torch.zeros(_FRAME, dtype=torch.uint8)
        frame[:16] = torch.tensor([PROTOCOL_VERSION, len(header)], dtype=torch.int64).view(torch.uint8)
        first, rest = header[: _FRAME - 16], header[_FRAME - 16 :]
        if first:
            frame[16 : 16 + len(first)] = torch.frombuffer(bytearray(first), dtype=torch.uint8)
        dist.send(frame, dst=other, group=self._group)
        if rest:
            dist.send(torch.frombuffer(bytearray(rest), dtype=torch.uint8), dst=other, group=self._group)

    def _receive_tensors(self, other: int, specs: list[TensorSpec]) -> list[Tensor]:
        sizes = [spec_bytes(spec) for spec in specs]
        ends = list(itertools.accumulate(size + -size % 8 for size in sizes))
        payload = torch.empty(ends[-1] if ends else 0, dtype=torch.uint8, device=self.device)
        if payload.numel():
            dist.recv(payload, src=other, group=self._payload_group or self._group)
        return [
            payload[end - size - -size % 8 : end - -size % 8].view(dtype).reshape(shape)
            for end, size, (dtype, shape) in zip(ends, sizes, specs, strict=True)
        ]

    def _send_heartbeats(self) -> None:
        while self._is_open:
            time.sleep(self.timeout_seconds / 4)
            for other in self._others:
                if self._is_open and other not in self.gone and self._locks[other].acquire(blocking=False):
                    try:
                        self._send_frames(other, b"")
                    except RuntimeError:
                        self.gone.add(other)
                    finally:
                        self._locks[other].release()

    def _gone_error(self, other: int, error: BaseException) -> PeerGoneError:
        self.gone.add(other)
        is_silent = any(word in str(error).lower() for word in ("timed out", "timeout"))
        what = f"did not answer for {self.timeout_seconds:g} s ({self.naming.timeout})" if is_silent else "has ended"
        return PeerGoneError(other, f"{self.naming.process(other)} {what}{self.activity}")


def _join(tensors: list[Tensor], device: torch.device) -> Tensor:
    """All bytes of some tensors, each aligned to eight bytes, ``[n]`` uint8: one transfer instead of many."""
    parts = [t.detach().contiguous().view(-1).view(torch.uint8).to(device) for t in tensors if t.numel()]
    aligned = [torch.nn.functional.pad(part, (0, -len(part) % 8)) for part in parts]
    return torch.cat(aligned) if aligned else torch.empty(0, dtype=torch.uint8)
