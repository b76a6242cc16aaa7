"""Messages for paths that are mistyped: which paths that exist are spelled nearly so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

_MOST_ENTRIES, _MOST_PATHS = 5000, 3
"""Limits of the entries of a directory that are compared, and of the paths in a message."""
_ARCHIVES = (".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".tar", ".rar")


def not_a_directory(given: str, path: Path) -> str:
    """Phrase that a path is not a directory, and what to give instead if that can be told.

    Args:
        given: The setting as the user wrote it, such as ``data.root=ml1m``.
        path: The path that it stands for.
    """
    if not _is(path, os.path.isfile):
        return f"{given} is not a directory{similar(path)}"
    if path.suffix in _ARCHIVES:
        return f"{given} is not a directory but an archive; decompress it"
    return f"{given} is not a directory but a file; its directory is {path.parent}"


def similar(path: Path) -> str:
    """``"; similar: PATH, …"`` for paths that exist and are spelled like one that does not; or which part is absent.

    Empty for a path that exists.
    """
    if _is(path, os.path.lexists):
        return ""
    found = [str(near) for near in islice(_like(path), _MOST_PATHS)]
    if found:
        return f"; similar: {', '.join(found)}"
    first = next((part for part in (*reversed(path.parents), path) if not _is(part, os.path.lexists)), path)
    return f"; {first} does not exist" if first != path else ""


def _like(path: Path) -> Iterator[Path]:
    """Existing paths whose parts are equal to those of ``path``, or similar; the most similar first."""
    if path in (Path(path.anchor), Path()):
        yield path
        return
    parents = (path.parent,) if _is(path.parent, os.path.isdir) else _like(path.parent)
    for parent in islice(parents, _MOST_PATHS):
        if _is(parent / path.name, os.path.lexists):
            yield parent / path.name
        else:
            yield from (parent / name for name in _names_like(path.name, parent))


def _names_like(name: str, folder: Path) -> list[str]:
    """Entries of a directory that are spelled like ``name``, without regard to case and to the signs between words."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in islice(entries, _MOST_ENTRIES))
    except OSError:
        return []
    by_letters: dict[str, list[str]] = {}
    for entry in names:
        by_letters.setdefault(_letters(entry), []).append(entry)
    close = get_close_matches(_letters(name), by_letters, n=_MOST_PATHS, cutoff=0.6)
    return [entry for letters in close for entry in by_letters[letters]]


def _letters(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in "-_. ")


def _is(path: Path, test: object) -> bool:
    """The answer of a function of ``os.path``; ``False`` for what cannot be a path, such as one that is too long."""
    assert callable(test)
    try:
        return bool(test(path))
    except (OSError, ValueError):
        return False
