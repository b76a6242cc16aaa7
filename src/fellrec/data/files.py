"""Which files a data set has, by their names alone: formats of tables, and what a data set is called by its files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from fellrec.errors import DataError, unknown

FORMATS: Mapping[str, str] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""The ending of a file's name → the format of a table. Text may be compressed: ``.csv.gz``."""
PLACES = ("root", "path", "items", "users")
"""Settings of ``data``, and of its reader, that say where files are."""
STAGES = ("train", "valid", "test")
GZIP = ".gz"
META = "meta_"
"""How the names of Amazon's files of metadata begin."""

_ATOMIC = re.compile(rf"(\.({'|'.join(STAGES)}))?\.inter$")
_AMAZON = re.compile(r"\.(jsonl?|csv)(\.gz)?$")
_MOST_FILES = 10_000


def stem(path: Path) -> str:
    """The name of a file without the ending that says its format.

    Example:
        >>> stem(Path("data/plays.csv.gz")), stem(Path("my.plays.parquet")), stem(Path("plays"))
        ('plays', 'my.plays', 'plays')
    """
    name = path.name.removesuffix(GZIP)
    ending = Path(name).suffix
    return name.removesuffix(ending) if ending.lower() in FORMATS else name


def format_of(path: Path, given: str, setting: str) -> str:
    """The format of a table.

    Args:
        path: The file.
        given: ``data.reader.format``.
        setting: The setting that names the file, for the message.

    Raises:
        DataError: If the ending of the name says nothing.

    Example:
        >>> format_of(Path("plays.tsv.gz"), "auto", "data.path"), format_of(Path("plays.txt"), "csv", "data.path")
        ('tsv', 'csv')
    """
    if given != "auto":
        return given
    ending = Path(path.name.removesuffix(GZIP)).suffix.lower()
    if ending not in FORMATS:
        known = f"{', '.join(FORMATS)} (text also as {GZIP})"
        raise DataError(
            f"{setting}={path}: the ending {ending or path.name!r} says no format; allowed: {known}, or give "
            "data.reader.format=csv, tsv, jsonl or parquet"
        )
    return FORMATS[ending]


def atomic_names(folder: Path) -> list[str]:
    """The data sets of a folder as RecBole's atomic files, by name."""
    return sorted({_ATOMIC.sub("", path.name) for path in folder.glob("*.inter")})


def amazon_files(folder: Path) -> list[Path]:
    """The files of a folder that may be Amazon's reviews or ratings."""
    found = islice(folder.iterdir(), _MOST_FILES) if folder.is_dir() else ()
    return sorted(path for path in found if _AMAZON.search(path.name) and not path.name.startswith(META))


def amazon_file(root: str, name: str | None) -> Path:
    """The file of Amazon's reviews or ratings in a folder.

    Args:
        root: The folder, ``data.root``.
        name: Of the file, with or without its ending; ``None`` takes the only one.

    Raises:
        DataError: If there is none, or none with this name, or several.
    """
    folder = Path(root).expanduser()
    files = amazon_files(folder)
    chosen = files if name is None else [path for path in files if name in (path.name, stem(path))]
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(path.name for path in chosen or files)
    if not files:
        raise DataError(
            f"data.root={root} has no file of reviews or ratings: CATEGORY.jsonl, CATEGORY.json or CATEGORY.csv, also "
            f"with {GZIP}"
        )
    if not chosen:
        raise DataError(unknown("data.reader.name", name, [path.name for path in files]))
    raise DataError(f"data.root={root} has {names}; select one with data.reader.name=NAME")


def files_name(data: Mapping[str, Any]) -> str:
    """What a data set is called by its files: that of the table, of the atomic files, or of the folder.

    Args:
        data: The settings of ``data``, plain values; its files may not exist.

    Example:
        >>> files_name({"path": "/a/plays.csv", "root": None, "reader": {}})
        'plays'
        >>> files_name({"root": "/a/ml-25m", "reader": {"_target_": "fellrec.data.readers.MovieLensCsvReader"}})
        'ml-25m'
    """
    reader = data.get("reader") or {}
    kind, folder = str(reader.get("_target_")).rpartition(".")[2], Path(data["root"] or "").expanduser().resolve()
    if data.get("path"):
        name = stem(Path(data["path"]))
    elif reader.get("name"):
        name = stem(Path(reader["name"]))
    else:
        own: Sequence[str] = []
        if kind == "AtomicReader":
            own = atomic_names(folder)
        elif kind == "AmazonReader":
            own = [stem(path) for path in amazon_files(folder)]
        name = own[0] if len(own) == 1 else folder.name
    return name.lstrip(".") or "data"
