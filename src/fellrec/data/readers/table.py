"""Delimited text files, read strictly: a malformed line is an error that names file and line."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import pandas as pd

from fellrec.data.schema import Locate
from fellrec.errors import DataError, shorten

UTF8 = ("utf-8",)
UTF8_OR_LATIN1 = ("utf-8", "latin-1")
"""Of files that are published as latin-1: copies of them are often saved as UTF-8."""

_ROWS = 1 << 17
"""Rows of a file that are in memory as Python lists at the same time."""
_UTF8_LETTER = re.compile(rb"[\xc3-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}")


def read_table(
    path: Path,
    separator: str,
    columns: Sequence[str] | None = None,
    encodings: Sequence[str] = UTF8,
    last_is_free: bool = False,
) -> pd.DataFrame:
    """Read a file as text columns.

    Args:
        path: The file. A byte order mark before the text is ignored.
        separator: Between fields; quotes have no meaning.
        columns: Column names of a file without a header; ``None`` takes the first line.
        encodings: Of the file; the first that fits is used.
        last_is_free: Whether the last of ``columns`` may hold the separator; it is then not split further.

    Returns:
        All fields as text; row ``r`` is line ``r + 1`` of the file, or ``r + 2`` if it has a header.

    Raises:
        DataError: If the file is missing, has none of the encodings, has a column twice, or a line has another number
            of fields.
    """
    text = _decode(path, encodings)
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
    require_distinct(names, path)
    counts = [line.count("\t") + 1 for line in lines]
    wrong = [number for number, count in enumerate(counts) if count != len(names)]
    if wrong:
        raise DataError(
            f"{path}:{wrong[0] + 1} has {counts[wrong[0]]} fields instead of {len(names)} "
            f"({shorten(', '.join(names))}); {len(wrong)} such lines"
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
        lineterminator="\n",  # else a carriage return inside a field would begin a line
    )


def read_csv(path: Path) -> tuple[pd.DataFrame, Locate]:
    """Read a comma-separated UTF-8 file with a header, whose fields may be in double quotes.

    Returns:
        All fields as text, and row → ``file:line``.

    Raises:
        DataError: If the file is missing, is not UTF-8, has a column twice, or a line has another number of fields.
    """
    rows = csv.reader(io.StringIO(_decode(path, UTF8), newline=""), strict=True)
    lines = array("q")

    def checked(names: list[str]) -> Iterator[list[str]]:
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(names):
                raise DataError(
                    f"{path}:{line} has {len(row)} fields instead of {len(names)} ({shorten(', '.join(names))})"
                )
            if row:  # not a blank line
                lines.append(line)
                yield row
            line = rows.line_num + 1

    try:
        names = next(rows, [])
        if not names:
            raise DataError(f"{path} is empty")
        require_distinct(names, path)
        parts = [pd.DataFrame(part, columns=names, dtype=str) for part in _batches(checked(names))]
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: {error}") from error
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=names, dtype=str)
    return table, lambda row: f"{path}:{lines[row]}"


def to_numbers(column: pd.Series, locate: Locate) -> pd.Series:
    """A text column as floats.

    Args:
        column: Text.
        locate: Row → ``file:line``, for the message.

    Raises:
        DataError: If a field is not a number.
    """
    numbers = pd.to_numeric(column, errors="coerce")
    _refuse_fields(column, numbers.isna(), "is not a number", locate)
    return numbers.astype(float)


def to_times(column: pd.Series, locate: Locate) -> pd.Series:
    """A text column of numbers or of ISO 8601 dates and times as floats, dates in seconds since 1970; NaN where empty.

    Args:
        column: Text; times without an offset are UTC.
        locate: Row → ``file:line``, for the message.

    Raises:
        DataError: If a field is neither, or if the column has both.
    """
    is_missing = column.str.strip() == ""
    numbers = pd.to_numeric(column, errors="coerce")
    if not numbers.notna().any() and not is_missing.all():
        dates = pd.to_datetime(column.str.strip(), errors="coerce", format="ISO8601", utc=True)
        _refuse_fields(column, dates.isna() & ~is_missing, "is not a number or an ISO 8601 time", locate)
        return (dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
    _refuse_fields(column, numbers.isna() & ~is_missing, "is not a number", locate)
    return numbers.astype(float)


def _refuse_fields(column: pd.Series, is_wrong: pd.Series, what: str, locate: Locate) -> None:
    if is_wrong.any():
        row = int(is_wrong.to_numpy().argmax())
        raise DataError(f"{locate(row)}: {shorten(repr(column.iloc[row]))} {what} for {column.name}")


def require_columns(table: pd.DataFrame, columns: Sequence[str], path: Path) -> None:
    """Check the columns of a file's header.

    Raises:
        DataError: Naming the missing columns and those present.
    """
    if text := lacking(table, columns, path):
        raise DataError(text)


def lacking(table: pd.DataFrame, columns: Sequence[str], path: Path) -> str:
    """Phrase which columns a file's header lacks; empty if it has all."""
    missing = [name for name in columns if name not in table.columns]
    present = shorten(", ".join(map(str, table.columns)))
    return f"{path}:1 lacks the column {', '.join(missing)}; it has {present}" if missing else ""


def require_distinct(names: Sequence[str], path: Path) -> None:
    """Check that no two columns of a file have the same name.

    Raises:
        DataError: Naming the columns.
    """
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path}:1 has the column {shorten(', '.join(map(repr, twice)))} more than once")


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


def lines_of(path: Path, first_line: int) -> Locate:
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


def _batches(rows: Iterator[list[str]]) -> Iterator[list[list[str]]]:
    while batch := list(islice(rows, _ROWS)):
        yield batch


def _decode(path: Path, encodings: Sequence[str]) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode(encodings[0])
    except UnicodeDecodeError as error:
        is_mixed = bool(_UTF8_LETTER.search(raw))
        if len(encodings) > 1 and not is_mixed:
            return raw.decode(encodings[1])
        start = error.start + len(raw) - len(error.object)
        line = raw[:start].count(b"\n") + 1
        also = f", but other letters are, so it is not {encodings[1]}" if len(encodings) > 1 else ""
        raise DataError(f"{path}:{line} is not {encodings[0]}: byte 0x{raw[start]:02x}{also}") from error
