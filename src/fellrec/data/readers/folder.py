"""The folder of a data set: which files it has, which format they have, and the hash of their contents."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from fellrec.errors import DataError, shorten
from fellrec.state.nearest import not_a_directory

FILES: Mapping[str, Sequence[str]] = {
    "ml_1m": ("ratings.dat", "movies.dat"),
    "ml_100k": ("u.data", "u.item", "u.user"),
    "ml_csv": ("ratings.csv", "movies.csv"),
    "micro_lens": ("MicroLens-100k_pairs.csv", "MicroLens-100k_title_en.csv"),
}
"""``data=`` → the files that its reader needs; ``data=atomic`` needs a ``.inter`` file, whatever its name is."""
_MOST_FILES = 200
"""Limit of the entries of a folder that are looked at for messages."""
_PART = 1 << 24
"""Bytes of a file that are in memory at the same time."""


def existing_files(root: str, names: Sequence[str], otherwise: str | None = None) -> list[Path]:
    """Paths of the files of a folder.

    Args:
        root: The folder, ``data.root``.
        names: Of the files.
        otherwise: What is accepted instead, for the message.

    Raises:
        DataError: If the folder or any file is missing; all of them are named, and what the folder has instead.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(not_a_directory(f"data.root={root}", folder))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        also = f", or {otherwise}" if otherwise else ""
        instead = found_instead(root, names)
        raise DataError(f"data.root={root} lacks {', '.join(missing)}; expected {', '.join(names)}{also}{instead}")
    return [folder / name for name in names]


def found_instead(root: str, names: Sequence[str]) -> str:
    """Phrase what a folder has instead of the files of its data set, after a semicolon; empty if that cannot be told.

    Args:
        root: The folder, ``data.root``.
        names: Of the files; empty for a ``.inter`` file of any name.
    """
    folder = Path(root).expanduser()
    for inner in (path for path in _entries(folder) if path.is_dir()):
        if all((inner / name).is_file() for name in names) if names else any(inner.glob("*.inter")):
            return f"; they are in {inner}"
    formats = {" and ".join(files): name for name, files in FILES.items() if all((folder / f).is_file() for f in files)}
    if any(folder.glob("*.inter")):
        formats["*.inter"] = "atomic"
    if formats:
        return "".join(f"; {files} are read by data={name}" for files, name in formats.items())
    present = [path.name for path in _entries(folder) if path.is_file()]
    near = [file for name in names for file in get_close_matches(name, present, cutoff=0.8)]
    shown = list(dict.fromkeys(near)) or present[:10]
    return f"; there is {shorten(', '.join(shown))}" if shown else ""


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents of the files, absent ones by their name.

    Raises:
        DataError: If a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        if path.exists():
            is_empty = True
            for part in _parts(path):
                digest.update(part)
                is_empty = False
            if is_empty:
                digest.update(b"\0empty")
    return digest.hexdigest()


def _parts(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while part := file.read(_PART):
                yield part
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _entries(folder: Path) -> Iterator[Path]:
    try:
        return iter(sorted(islice(folder.iterdir(), _MOST_FILES)))
    except OSError:
        return iter(())
