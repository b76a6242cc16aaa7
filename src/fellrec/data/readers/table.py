"""Delimited text files, read strictly: a malformed line is an error that names file and line."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from fellrec.errors import DataError


def read_table(
    path: Path,
    separator: str,
    columns: Sequence[str] | None = None,
    encoding: str = "utf-8",
    last_is_free: bool = False,
) -> pd.DataFrame:
    """Read a file as text columns.

    Args:
        path: The file.
        separator: Between fields; quotes have no meaning.
        columns: Column names of a file without a header; ``None`` takes the first line.
        encoding: Of the file.
        last_is_free: Whether the last of ``columns`` may hold the separator; it is then not split further.

    Returns:
        All fields as text; row ``r`` is line ``r + 1`` of the file, or ``r + 2`` if it has a header.

    Raises:
        DataError: If the file is missing, is not in this encoding, or a line has another number of fields.
    """
    text = _decode(path, encoding)
    if separator != "\t":
        text = text.replace("\t", " ")
    lines = text.replace("\r\n", "\n").split("\n")  # splitlines would also break at latin-1's 0x85
    if separator != "\t":
        most = len(columns) - 1 if columns is not None and last_is_free else -1
        lines = [line.replace(separator, "\t", most) for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{path} is empty")
    names = list(columns) if columns is not None else lines[0].split("\t")
    counts = [line.count("\t") + 1 for line in lines]
    wrong = [number for number, count in enumerate(counts) if count != len(names)]
    if wrong:
        raise DataError(
            f"{path}:{wrong[0] + 1} has {counts[wrong[0]]} fields instead of {len(names)} "
            f"({', '.join(names)}); {len(wrong)} such lines"
        )
    return pd.read_csv(
        io.StringIO("\n".join(lines)),
        sep="\t",
        header=None,
        names=names,
        skiprows=0 if columns is not None else 1,
        dtype=str,
        keep_default_na=False,
        quoting=csv.QUOTE_NONE,
        skip_blank_lines=False,
    )


def to_numbers(column: pd.Series, path: Path, first_line: int) -> pd.Series:
    """A text column as floats.

    Args:
        column: Text.
        path: File, for the message.
        first_line: Line of the file that row 0 comes from.

    Raises:
        DataError: If a field is not a number.
    """
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers.isna().any():
        row = int(numbers.isna().to_numpy().argmax())
        raise DataError(f"{path}:{row + first_line}: {column.iloc[row]!r} is not a number for {column.name}")
    return numbers.astype(float)


def require_columns(table: pd.DataFrame, columns: Sequence[str], path: Path) -> None:
    """Check the columns of a file's header.

    Raises:
        DataError: Naming the missing columns and those present.
    """
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise DataError(f"{path}:1 lacks the column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")


def existing_files(root: str, names: Sequence[str], otherwise: str | None = None) -> list[Path]:
    """Paths of the files of a folder.

    Args:
        root: The folder, ``data.root``.
        names: Of the files.
        otherwise: What is accepted instead, for the message.

    Raises:
        DataError: If the folder or any file is missing; all of them are named.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise DataError(f"data.root={root} is not a directory")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        also = f", or {otherwise}" if otherwise else ""
        raise DataError(f"data.root={root} lacks {', '.join(missing)}; expected {', '.join(names)}{also}")
    return [folder / name for name in names]


def lines_of(path: Path, first_line: int) -> Callable[[int], str]:
    """Row → ``file:line``."""
    return lambda row: f"{path}:{row + first_line}"


def hash_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the contents of the files, absent ones by their name.

    Raises:
        DataError: If a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode())
        if path.exists():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _decode(path: Path, encoding: str) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line} is not {encoding}: byte 0x{raw[error.start]:02x}") from error
