"""Files and directories that exist complete or not at all: a draft beside them, flushed to the disk, renamed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fellrec.errors import CheckpointError, StorageError

if TYPE_CHECKING:
    import pandas as pd

DRAFT = "."
"""First letter of a draft's name, which glob patterns without it do not match."""
_SYNCED_AT_A_TIME = 8
"""Files that are flushed at the same time."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that at any moment the old or the new content is there, never a part of it.

    Raises:
        StorageError: If it cannot be written; the old file stays.
    """
    draft = draft_of(path)
    with writing(path):
        try:
            draft.write_bytes(content)
            commit(draft, path)
        except OSError:
            discard(draft)
            raise
        sync_folder(path.parent)


def draft_of(path: Path) -> Path:
    """Where a file or directory is written before it gets its name."""
    return path.with_name(f"{DRAFT}{path.name}.{os.getpid()}")


def commit(draft: Path, path: Path) -> None:
    """Flush a draft to the disk and rename it; ``sync_folder`` makes the new name durable."""
    _flush(draft)
    draft.replace(path)


def discard(draft: Path) -> None:
    """Remove a draft, if it exists and can be removed."""
    with suppress(OSError):
        draft.unlink()


def sync_folder(folder: Path) -> None:
    """Flush the names in a directory to the disk."""
    _flush(folder)


def sync_files(paths: Iterable[Path], folder: Path) -> None:
    """Flush files of a directory to the disk, and then their names; several at a time, which takes less time in all.

    Raises:
        StorageError: If one of them cannot be written.
    """
    with ThreadPoolExecutor(_SYNCED_AT_A_TIME) as pool:
        list(pool.map(_sync_file, paths))
    with writing(folder):
        sync_folder(folder)


@contextmanager
def private_files() -> Iterator[None]:
    """Let only the user read what this process creates: a run directory has users' interactions."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def make_folder(folder: Path) -> None:
    """Make a directory that may exist.

    Raises:
        StorageError: If it cannot be created.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def link_files(source: Path, folder: Path) -> None:
    """Give a directory the files of another one: by links, or by copies where the file system has no links.

    Args:
        source: A directory of files.
        folder: New, or with files of the same names, which are replaced.

    Raises:
        StorageError: If a file cannot be written.
    """
    make_folder(folder)
    for path in source.iterdir():
        draft = draft_of(folder / path.name)
        with writing(folder / path.name):
            try:
                try:
                    os.link(path, draft)
                except OSError:
                    shutil.copyfile(path, draft)
                draft.replace(folder / path.name)
            except OSError:
                discard(draft)
                raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report which file could not be written, why, and how much space is left.

    Raises:
        StorageError: In place of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}{_space_left(path)}") from error


@contextmanager
def explaining_full_disks(folder: Path) -> Iterator[None]:
    """For code of other libraries: a message if the disk is full or read-only, any other error unchanged.

    Args:
        folder: Named if the error names no file.

    Raises:
        StorageError: In place of such an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        with writing(Path(error.filename or folder)):
            raise


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write JSON atomically.

    Raises:
        StorageError: If it cannot be written.
    """
    write_atomically(path, (json.dumps(value, indent=indent, default=float) + "\n").encode())


def write_checked(path: Path, value: Any) -> None:
    """Write JSON atomically, with its checksum; `read_checked` reads it.

    Raises:
        StorageError: If it cannot be written.
    """
    text = _compact(value)
    write_atomically(path, f'{{"checksum": "{_checksum(text)}", "content": {text}}}\n'.encode())


def read_checked(path: Path) -> Any:
    """Read JSON of `write_checked`.

    Raises:
        CheckpointError: If the file is missing or differs from what was written.
    """
    try:
        whole = json.loads(path.read_bytes())
        expected, content = whole["checksum"], whole["content"]
        found = _checksum(_compact(content))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it differs from what was written") from error
    if found != expected:
        raise CheckpointError(f"{path} is damaged: its checksum differs")
    return content


def write_parquet(path: Path, frame: pd.DataFrame) -> None:
    """Write a table atomically, without its index.

    Raises:
        StorageError: If it cannot be written.
    """
    write_atomically(path, frame.to_parquet(None, index=False))


def _sync_file(path: Path) -> None:
    with writing(path):
        _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _checksum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _space_left(path: Path) -> str:
    for folder in (path, *path.parents):
        if folder.is_dir():
            return f"; {shutil.disk_usage(folder).free / 1e6:.1f} MB are free there"
    return ""
