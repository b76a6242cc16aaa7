"""Delimited text files, read strictly: a malformed line is an error that names file and line."""

from __future__ import annotations

import csv
import io
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd

from fellrec.data.readers.decoding import UTF8, decode, lines_of_text
from fellrec.data.schema import NO_VALUE, Locate
from fellrec.errors import ConfigError, DataError, shorten

_SEPARATORS = {"\t": "a tab", ",": "a comma"}
_CLOCK = ("now", "today")
"""What pandas takes for the time at which it reads."""
_ROWS = 1 << 17
"""Rows of a file that are in memory as Python lists at the same time."""


def read_table(
    path: Path,
    separator: str,
    columns: Sequence[str] | None = None,
    encodings: Sequence[str] = UTF8,
    last_is_free: bool = False,
) -> pd.DataFrame:
    """Read a file as text columns.

    Args:
        path: The file.
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
    lines = lines_of_text(path, encodings)
    if separator != "\t":
        most = len(columns) - 1 if columns is not None and last_is_free else -1
        lines = [line.replace("\t", " ").replace(separator, "\t", most) for line in lines]
    names = list(columns) if columns is not None else [name.strip() for name in lines[0].split("\t")]
    require_distinct(names, path)
    counts = [line.count("\t") + 1 for line in lines]
    wrong = [number for number, count in enumerate(counts) if count != len(names)]
    if wrong:
        line = lines_of_text(path, encodings)[wrong[0]]
        shown = f", the line is {shorten(repr(line))}" if counts[wrong[0]] == 1 else ""
        raise DataError(
            f"{path}:{wrong[0] + 1} has {counts[wrong[0]]} fields instead of {len(names)} "
            f"({shorten(', '.join(names))}), which {_SEPARATORS.get(separator, repr(separator))} separates{shown}; "
            f"{len(wrong)} such lines"
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


def read_csv(
    path: Path, separator: str = ",", header: Sequence[str] | None = None, wanted: Sequence[str] | None = None
) -> tuple[pd.DataFrame, Locate]:
    """Read a UTF-8 file whose fields may be in double quotes.

    Args:
        path: The file.
        separator: Between fields, one character.
        header: Names of the columns of a file without a header; ``None`` takes the first line.
        wanted: Columns to keep; ``None`` keeps all.

    Returns:
        Fields as text, and row → ``file:line``.

    Raises:
        DataError: If the file is missing, is not UTF-8, has a column twice, or a line has another number of fields.
    """
    rows = csv.reader(io.StringIO(decode(path, UTF8), newline=""), strict=True, delimiter=separator)
    lines = array("q")

    def checked(names: Sequence[str], places: Sequence[int]) -> Iterator[list[str]]:
        """The wanted fields of the rows, each of which must have as many fields as the header has names."""
        line = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(names):
                raise DataError(
                    f"{path}:{line} has {len(row)} fields instead of {len(names)} ({shorten(', '.join(names))})"
                )
            if row:  # not a blank line
                lines.append(line)
                yield [row[place] for place in places]
            line = rows.line_num + 1

    try:
        names = header if header is not None else [name.strip() for name in next(rows, [])]
        if not names:
            raise DataError(f"{path} is empty")
        require_separated(names, path, separator)
        require_distinct(names, path)
        kept = names if wanted is None else wanted
        batches = _batches(checked(names, [names.index(name) for name in kept]))
        parts = [pd.DataFrame(part, columns=list(kept), dtype=str) for part in batches]
    except csv.Error as error:
        cause = "a quoted field does not end" if "unexpected end" in str(error) else str(error)
        raise DataError(f"{path}:{rows.line_num}: {cause}") from error
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(kept), dtype=str)
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


def to_times(column: pd.Series, locate: Locate, time_format: str | None = None) -> pd.Series:
    """A text column of numbers or of ISO 8601 dates and times as floats, dates in seconds since 1970.

    A field that is empty, or says that there is no value (``NULL``, ``NaN``, ``\\N``), is NaN.

    Args:
        column: Text; times without an offset are UTC.
        locate: Row → ``file:line``, for the message.
        time_format: Of times that are neither numbers nor ISO 8601, as for ``strptime``; all must have it.

    Raises:
        DataError: If a field is neither, or if the column has both.
        ConfigError: If ``time_format`` is not a format.
    """
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers.notna().all() and time_format is None:
        return numbers.astype(float)
    is_missing = column.str.strip().str.lower().isin(NO_VALUE)
    if time_format is None and (is_missing.all() or numbers[~is_missing].notna().any()):
        _refuse_fields(column, numbers.isna() & ~is_missing, "is not a number", locate)
        return numbers.astype(float)
    texts = column.where(~is_missing & ~column.str.strip().str.lower().isin(_CLOCK)).str.strip()
    try:
        dates = pd.to_datetime(texts, errors="coerce", format=time_format or "ISO8601", utc=True)
    except ValueError as error:
        raise ConfigError(f"data.reader.time_format={time_format} is not allowed: {error}") from error
    expected = f"has not the format {time_format}" if time_format else "is not a number or an ISO 8601 time"
    _refuse_fields(column, dates.isna() & ~is_missing, expected, locate)
    microseconds = dates.dt.as_unit("us").astype("int64")  # nanoseconds have no year 1, and none above 2262
    return (microseconds / 1e6).where(dates.notna())


def _refuse_fields(column: pd.Series, is_wrong: pd.Series, what: str, locate: Locate) -> None:
    if is_wrong.any():
        rows = np.flatnonzero(is_wrong.to_numpy())
        more = f"; {len(rows):,} such fields, the next at {locate(int(rows[1]))}" if len(rows) > 1 else ""
        raise DataError(f"{locate(int(rows[0]))}: {shorten(repr(column.iloc[rows[0]]))} {what} for {column.name}{more}")


def require_columns(table: pd.DataFrame, columns: Sequence[str], path: Path) -> None:
    """Check the columns of a file's header.

    Raises:
        DataError: Naming the missing columns and those present.
    """
    if text := lacking(table, columns, path):
        raise DataError(text)


def require_separated(header: Sequence[str], path: Path, separator: str) -> None:
    """Check that a header is not one field because another separator is between its names.

    Raises:
        DataError: Naming the separator, with the header as it stands.
    """
    if len(header) == 1 and re.search(r"[,;|\s]", header[0]):
        mark, found = _SEPARATORS.get(separator, separator), shorten(repr(header[0]))
        raise DataError(f"{path}:1: columns must be separated by {mark}; the header is {found}")


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


def lines_of(path: Path, first_line: int) -> Locate:
    """Row → ``file:line``."""
    return lambda row: f"{path}:{row + first_line}"


def _batches(rows: Iterator[list[str]]) -> Iterator[list[list[str]]]:
    while batch := list(islice(rows, _ROWS)):
        yield batch
