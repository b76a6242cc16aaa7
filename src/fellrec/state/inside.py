"""A run directory may come from someone else: nothing in it may name a file outside it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from fellrec.errors import CheckpointError, ConfigError


def check_inside(run_dir: Path) -> None:
    """Refuse a run directory with links, pipes, sockets or devices in it; the directory itself may be given by a link.

    Resuming a run deletes and replaces files of the run directory, and a link would lead these to files elsewhere.

    Raises:
        ConfigError: Naming the first one, or the folder that cannot be read.
    """
    waiting = [str(run_dir.resolve())]
    while waiting:
        folder = waiting.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise ConfigError(f"{folder} cannot be read: {error.strerror or error}") from error
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif not _is_plain(entry):
                what = "a link" if entry.is_symlink() else "neither a file nor a directory"
                raise ConfigError(f"{entry.path} is {what}: a run directory may only have files and directories")


def _is_plain(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode)
    except FileNotFoundError:  # another process's lock
        return True


def file_in(folder: Path, name: object, suffix: str) -> Path:
    """The file of a folder that a stored name stands for.

    Raises:
        CheckpointError: If it is anything but the plain name of a file with this suffix.
    """
    if not isinstance(name, str) or Path(name).name != name or "\0" in name or not name.endswith(suffix):
        raise CheckpointError(f"{folder}: {name!r} is not the name of one of its files")
    return folder / name
