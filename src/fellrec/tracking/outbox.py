"""The outbox of a run: all that its MLflow run is made of, in order, on disk before anything is sent.

``outbox/operations.jsonl`` only grows, one JSON object per line, each on disk before the run goes on.
``outbox/sent.json`` says how many of them the tracking server has acknowledged, and the id of the run there. A process
may die between an acknowledgement and this note; so an operation can be sent twice, and each is one for which that
changes nothing.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fellrec.errors import ConfigError, TrainingError
from fellrec.state.files import sync_folder, write_json

_OPERATIONS, _SENT, _LOCK = "operations.jsonl", "sent.json", "lock"


@dataclass(frozen=True)
class Operation:
    """One thing to tell the tracking server.

    Attributes:
        number: From 0, without gaps.
        kind: What is done, such as ``"metrics"``.
        time: Milliseconds since 1970 when it was logged; the server gets this time whenever it is sent.
        fields: What the kind needs.
        end: Bytes of the file up to the end of this operation.
    """

    number: int
    kind: str
    time: int
    fields: Mapping[str, Any]
    end: int


@dataclass(frozen=True)
class Sent:
    """How far the tracking server knows the outbox.

    Attributes:
        number: Operations it has acknowledged.
        end: Bytes of the file up to there.
        run_id: The run's id on the server; ``None`` before it was made.
    """

    number: int = 0
    end: int = 0
    run_id: str | None = None


class Outbox:
    """The one writer of an outbox; what was cut off by a crash is dropped when it is opened.

    Args:
        folder: Made if absent.

    Raises:
        ConfigError: If another process writes it, or the folder cannot be written.
        TrainingError: If it is damaged anywhere but at its end.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._once: set[str] = set()
        self._number = self._end = 0
        try:
            folder.mkdir(exist_ok=True)
            self._file = os.open(folder / _OPERATIONS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written: {error}") from error
        try:
            self._take()
            for operation in operations(folder):
                self._number, self._end = operation.number + 1, operation.end
                self._once.add(operation.fields.get("once", ""))
            os.ftruncate(self._file, self._end)
            sync_folder(folder)
        except BaseException:
            self.close()
            raise

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever added."""
        return self._number == 0

    def append(self, kind: str, once: str | None = None, **fields: Any) -> bool:
        """Add one operation; it is on disk when this returns.

        Args:
            kind: What is done.
            once: A name under which it is done once in the run's life: a resumed run repeats rounds that were logged.
            **fields: Plain JSON values.

        Returns:
            Whether it was added; ``False`` if the outbox has one of that name.

        Raises:
            TrainingError: If the disk does not take it; the outbox stays as it was.
        """
        if once is not None and once in self._once:
            return False
        named = {} if once is None else {"once": once}
        record = {"n": self._number, "kind": kind, "time": int(time.time() * 1000), **named, **fields}
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        try:
            _write_all(self._file, line)
            os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise TrainingError(f"{self.folder / _OPERATIONS} cannot be written: {error}") from error
        self._number, self._end = self._number + 1, self._end + len(line)
        if once is not None:
            self._once.add(once)
        return True

    def close(self) -> None:
        """Let another process write."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _take(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):  # others: a file system without locks
                raise ConfigError(f"{self.folder.parent} is being written by another process") from error


def operations(folder: Path, start: Sent | None = None) -> Iterator[Operation]:
    """The operations after ``start``, up to the last one that is complete.

    Raises:
        TrainingError: If a line that is not the last cannot be read.
    """
    start = start or Sent()
    number, end = start.number, start.end
    if not (folder / _OPERATIONS).is_file():
        return
    with (folder / _OPERATIONS).open("rb") as file:
        file.seek(end)
        for line in file:
            record = _parsed(line)
            if record is None or record.pop("n", None) != number:
                if line.endswith(b"\n") and file.read(1):
                    raise TrainingError(f"{folder / _OPERATIONS} is damaged: operation {number} cannot be read")
                return  # cut off by a crash, or being written at this moment
            number, end = number + 1, end + len(line)
            yield Operation(number - 1, record.pop("kind"), record.pop("time"), record, end)


def first_operation(folder: Path) -> Operation | None:
    """How the run is made; ``None`` if the outbox has nothing."""
    return next(operations(folder), None)


def read_sent(folder: Path) -> Sent:
    """How far the server knows the outbox."""
    path = folder / _SENT
    return Sent(**json.loads(path.read_text())) if path.is_file() else Sent()


def write_sent(folder: Path, sent: Sent) -> None:
    """Record how far the server knows the outbox.

    Raises:
        StorageError: If it cannot be written; the old record stays.
    """
    write_json(folder / _SENT, asdict(sent), indent=None)


def num_left(folder: Path) -> int:
    """Operations that the server has not acknowledged."""
    return sum(1 for _ in operations(folder, read_sent(folder)))


@contextmanager
def sending(folder: Path) -> Iterator[None]:
    """Only one process sends at a time; another one waits for it."""
    with (folder / _LOCK).open("a") as file:
        with suppress(OSError):  # a file system without locks: what two processes send twice changes nothing
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
