"""Entries of a cache: directories that are used only as they were written, by this user or the administrator."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fellrec.errors import CheckpointError, StorageError
from fellrec.state.files import commit, draft_of, private_files, read_checked, sync_folder, write_checked, writing

log = logging.getLogger(__name__)

_MANIFEST = "entry.json"
"""Name of the entry, and size and checksum of each of its files."""
_LARGEST_MANIFEST = 1 << 20
_UNUSABLE = (CheckpointError, OSError, ValueError, TypeError, KeyError, AttributeError)


def is_intact(folder: Path) -> bool:
    """Whether there is an entry that can be used. A warning says why one that is there cannot.

    An entry is refused if a file is missing, added or changed, if it was copied from another entry, or if somebody else
    owns it or can write to it.
    """
    if not os.path.lexists(folder):
        return False
    try:
        _check(folder)
    except _UNUSABLE as error:
        log.warning("the cached %s is not used and made again: %s", folder, error)
        return False
    return True


def has_entries(folder: Path) -> bool:
    """Whether a folder is a cache: one of its kinds of entries has an entry."""
    try:
        return any(folder.glob(f"*/*/{_MANIFEST}"))
    except (OSError, ValueError):
        return False


@contextmanager
def new_entry(folder: Path) -> Iterator[Path]:
    """Write an entry beside its place and rename it. One that cannot be used is replaced; another process's stays.

    Yields:
        The directory to fill with files.

    Raises:
        StorageError: If it cannot be written; before anything is computed for it, if the place cannot be written to.
    """
    draft = draft_of(folder)
    shutil.rmtree(draft, ignore_errors=True)
    with writing_entry(folder), private_files():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft.mkdir(mode=0o700)
    try:
        with private_files():  # a file that others can write to would not be used again
            yield draft
        with writing_entry(folder):
            files = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(draft.iterdir())}
            with private_files():
                write_checked(draft / _MANIFEST, {"name": folder.name, "files": files})
            if os.path.lexists(folder) and not _is_usable(folder):
                _remove(folder)
            try:
                commit(draft, folder)
            except OSError:
                if not _is_usable(folder):  # else another process was faster
                    raise
            sync_folder(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def writing_entry(folder: Path) -> Iterator[None]:
    """Report that an entry could not be written, and which setting says where it is.

    Raises:
        StorageError: In place of an ``OSError``.
    """
    try:
        with writing(folder):
            yield
    except StorageError as error:
        problem = f"{error}; set cache_dir (or FELLREC_CACHE) to a folder that can be written to"
        raise StorageError(problem) from error


def _is_usable(folder: Path) -> bool:
    try:
        _check(folder)
    except _UNUSABLE:
        return False
    return True


def _check(folder: Path) -> None:
    """Raises an error that says why an entry cannot be used."""
    _check_owner(folder, stat.S_ISDIR)
    manifest_path = folder / _MANIFEST
    if not os.path.lexists(manifest_path):
        raise CheckpointError("it has no checksums")
    if _check_owner(manifest_path, stat.S_ISREG) > _LARGEST_MANIFEST:
        raise CheckpointError(f"{manifest_path.name} is damaged: it is too large")
    manifest = read_checked(manifest_path)
    if manifest["name"] != folder.name:
        raise CheckpointError("it is a copy of another entry")
    files = manifest["files"]
    if differing := sorted({path.name for path in folder.iterdir()} ^ {*files, _MANIFEST}):
        raise CheckpointError(f"{differing[0]} is missing, or was added")
    for name, (size, checksum) in files.items():
        if _check_owner(folder / name, stat.S_ISREG) != size or _checksum(folder / name) != checksum:
            raise CheckpointError(f"{name} is damaged: it differs from what was written")


def _check_owner(path: Path, is_kind: Callable[[int], bool]) -> int:
    """Raises an error if something is a link or another user's; gives its size."""
    about = path.lstat()
    if not is_kind(about.st_mode):
        raise CheckpointError(f"{path.name} is a link, or no ordinary file or directory")
    if about.st_uid not in (os.getuid(), 0) or about.st_mode & stat.S_IWOTH:
        raise CheckpointError(f"{path.name} belongs to another user, or others can write to it")
    return about.st_size


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()[:32]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
