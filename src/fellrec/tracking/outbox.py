"""The outbox of a run: every MLflow operation of the run, in order, written to disk before it is sent.

``outbox/operations.jsonl`` is append-only, with one JSON object per line, and is flushed after each line.
``outbox/sent.json`` has the number of operations that the MLflow server acknowledged and the id of the run there. A
process can die after an acknowledgement and before this file is written, so an operation can be sent twice; all
operations are idempotent.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
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
    """One call of the MLflow API.

    Attributes:
        number: From 0, without gaps.
        kind: Type of the operation, such as ``"metrics"``.
        time: Milliseconds since 1970 when it was logged; MLflow gets this time however late it is sent.
        fields: Arguments of the operation.
        end: Offset in the file after this operation, in bytes.
    """

    number: int
    kind: str
    time: int
    fields: Mapping[str, Any]
    end: int


@dataclass(frozen=True)
class Sent:
    """How much of an outbox was sent.

    Attributes:
        number: Number of operations that the server acknowledged.
        end: Offset in the file after them, in bytes.
        run_id: The run's id on the server; ``None`` until it is created there.
        experiment_id: That of its experiment.
    """

    number: int = 0
    end: int = 0
    run_id: str | None = None
    experiment_id: str | None = None


class Outbox:
    """The only writer of an outbox; opening it removes a line that a crash left incomplete.

    Args:
        folder: Directory of the outbox; created if absent.

    Raises:
        ConfigError: If another process has the outbox open, or the directory cannot be written.
        TrainingError: If a line before the last one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._once: set[str] = set()
        self._number = self._end = 0
        try:
            folder.mkdir(exist_ok=True, mode=0o700)
            refuse_link(folder)
            self._file = os.open(folder / _OPERATIONS, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be written: {error}") from error
        try:
            self._lock()
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
        """Whether the outbox has no operation."""
        return self._number == 0

    def append(self, kind: str, once: str | None = None, **fields: Any) -> bool:
        """Add one operation and flush it to disk.

        Args:
            kind: Type of the operation.
            once: A key that is added at most once: a resumed run may repeat rounds that were logged.
            **fields: JSON values.

        Returns:
            Whether it was added; ``False`` if the outbox has this key.

        Raises:
            TrainingError: If it cannot be written; the outbox is unchanged.
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
        """Close the file and release its lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):  # other errors: the file system has no locks
                raise ConfigError(f"{self.folder.parent} is being written by another process") from error


def refuse_link(folder: Path) -> None:
    """Refuse an outbox that is elsewhere: what is written there must stay in the run directory.

    Raises:
        OSError: If the folder is a symbolic link.
    """
    if folder.is_symlink():
        raise OSError("it is a symbolic link")


def operations(folder: Path, start: Sent | None = None) -> Iterator[Operation]:
    """Iterate over the complete operations of an outbox.

    Args:
        folder: The outbox.
        start: Where to start; ``None`` for the first operation.

    Raises:
        TrainingError: If a line before the last one cannot be read.
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
                return  # incomplete: after a crash, or while another process writes
            number, end = number + 1, end + len(line)
            kind, time = record.pop("kind", None), record.pop("time", None)
            if not isinstance(kind, str) or not isinstance(time, int):
                raise TrainingError(f"{folder / _OPERATIONS} is damaged: operation {number - 1} has no kind or no time")
            yield Operation(number - 1, kind, time, record, end)


def first_operation(folder: Path) -> Operation:
    """The operation that creates the run.

    Raises:
        TrainingError: If the outbox is empty, or this operation is damaged.
    """
    for operation in operations(folder):
        fields = operation.fields
        uids = [fields.get("uid"), fields.get("parent_uid") or "0"]
        texts = [fields.get(name) for name in ("uri", "experiment", "run_name")]
        are_uids = all(isinstance(uid, str) and re.fullmatch("[0-9a-f]{1,32}", uid) for uid in uids)
        is_whole = operation.kind == "create" and all(isinstance(text, str) for text in texts) and are_uids
        if not is_whole or not isinstance(fields.get("tags"), dict):
            raise TrainingError(f"{folder / _OPERATIONS} is damaged: its first operation does not create a run")
        return operation
    raise TrainingError(f"{folder} has no complete operation: the run stopped before it logged anything")


def read_sent(folder: Path) -> Sent:
    """Read how much of the outbox was sent.

    Raises:
        TrainingError: If the record is damaged.
    """
    path = folder / _SENT
    if not path.is_file():
        return Sent()
    try:
        sent = Sent(**json.loads(path.read_text()))
    except (ValueError, TypeError, RecursionError) as error:
        raise TrainingError(f"{path} is damaged; delete it to send everything again") from error
    size = (folder / _OPERATIONS).stat().st_size if (folder / _OPERATIONS).is_file() else 0
    is_place = all(isinstance(number, int) and 0 <= number <= size for number in (sent.number, sent.end))
    are_ids = all(isinstance(text, str | None) for text in (sent.run_id, sent.experiment_id))
    if not is_place or not are_ids or (sent.number > 0 and sent.run_id is None):
        raise TrainingError(f"{path} is damaged; delete it to send everything again")
    return sent


def write_sent(folder: Path, sent: Sent) -> None:
    """Write how much of the outbox was sent, atomically.

    Raises:
        StorageError: If it cannot be written; the old record stays.
    """
    write_json(folder / _SENT, asdict(sent), indent=None)


def num_left(folder: Path) -> int:
    """Number of operations that were not sent."""
    return sum(1 for _ in operations(folder, read_sent(folder)))


@contextmanager
def sending(folder: Path) -> Iterator[None]:
    """Hold the lock of the sender; another process waits for it."""
    refuse_link(folder)
    with os.fdopen(os.open(folder / _LOCK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600), "w") as file:
        with suppress(OSError):  # without file locks two processes may send an operation twice, which has no effect
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
