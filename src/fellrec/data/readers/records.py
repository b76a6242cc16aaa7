"""Tables in the usual formats, read as text: CSV, TSV, JSON lines and Parquet."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pandas as pd

from fellrec.data.files import GZIP
from fellrec.data.readers.decoding import UTF8, decode, refuse_other_kinds
from fellrec.data.readers.table import read_csv, require_separated
from fellrec.data.schema import Locate
from fellrec.errors import DataError, shorten

_SEPARATORS = (",", ";", "\t", "|")
_BEGINNING = 1 << 20
"""Bytes of a file of text that its header is looked for in."""
_SAMPLE = 1_000
"""Objects of JSON lines whose names are known before the file is read."""
_ROWS = 1 << 16


@dataclass(frozen=True)
class Layout:
    """How a table is written.

    Attributes:
        format: ``csv``, ``tsv``, ``jsonl`` or ``parquet``.
        separator: Of CSV; ``None`` takes a comma, or what else separates the header.
        header: Names of the columns of CSV or TSV without a header.
    """

    format: str
    separator: str | None = None
    header: Sequence[str] | None = None


def names_of(path: Path, layout: Layout) -> list[str]:
    """The names of the columns of a table, from its beginning; of JSON lines, all those of the first 1,000 objects.

    Raises:
        DataError: If the file is empty or not in its format.
    """
    if layout.header is not None:
        return list(layout.header)
    if layout.format == "parquet":
        return list(_parquet(path).schema_arrow.names)
    if layout.format == "jsonl":
        with _opened(path) as file:
            return list(dict.fromkeys(name for _, row in islice(_objects(path, file), _SAMPLE) for name in row))
    line = _first_line(path)
    separator = _separator(line, layout)
    names = [name.strip() for name in next(csv.reader([line], delimiter=separator), [])]
    require_separated(names, path, separator)
    return names


def read_records(path: Path, layout: Layout, wanted: Sequence[str]) -> tuple[pd.DataFrame, Locate]:
    """Read some columns of a table.

    Args:
        path: The file; text may be compressed, with a name that ends with ``.gz``.
        layout: How it is written.
        wanted: Columns to read.

    Returns:
        Fields as text, a missing value as an empty one; and row → its place, ``file:line``.

    Raises:
        DataError: If the file cannot be read, or a line is malformed.
    """
    if layout.format == "parquet":
        return _read_parquet(path, wanted)
    if layout.format == "jsonl":
        return _read_json_lines(path, wanted)
    return read_csv(path, _separator(_first_line(path), layout), layout.header, wanted)


def _separator(line: str, layout: Layout) -> str:
    if layout.format == "tsv":
        return "\t"
    return layout.separator or max(_SEPARATORS, key=lambda mark: (line.count(mark) > 0) + (mark == ",") * 0.5)


def _first_line(path: Path) -> str:
    """The first line of a text; what cannot be decoded in it is said when all is read."""
    try:
        with _opened(path) as file:
            beginning = file.read(_BEGINNING)
    except (gzip.BadGzipFile, EOFError, zlib.error, OSError):
        beginning = b""
    refuse_other_kinds(path, beginning)
    wide = beginning[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = beginning.decode("utf-16" if wide else "utf-8-sig", errors="replace")
    if not text.strip():
        decode(path, UTF8)  # says what is wrong with it, if it is not empty
        raise DataError(f"{path} is empty")
    return text.splitlines()[0]


def _opened(path: Path) -> BinaryIO:
    try:
        file: Any = gzip.open(path, "rb") if path.suffix == GZIP else path.open("rb")  # noqa: SIM115 (the caller closes)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return file


def _read_json_lines(path: Path, wanted: Sequence[str]) -> tuple[pd.DataFrame, Locate]:
    lines, parts = array("q"), []
    with _opened(path) as file:
        rows = ([line, *(_text(row.get(name)) for name in wanted)] for line, row in _objects(path, file))
        while batch := list(islice(rows, _ROWS)):
            lines.extend(row[0] for row in batch)  # type: ignore[misc]
            parts.append(pd.DataFrame([row[1:] for row in batch], columns=list(wanted), dtype=str))
    if not parts:
        raise DataError(f"{path} is empty")
    return pd.concat(parts, ignore_index=True), lambda row: f"{path}:{lines[row]}"


def _objects(path: Path, file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of JSON lines, each with the number of its line."""
    number = 0
    try:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # noqa: PLW2901
            if line.isspace():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError(
                    f'{path}:{number} is {_kind(row)}, not an object such as {{"user": …}}: JSON lines have one object '
                    "a line; jq -c '.[]' makes them of a list of objects"
                )
            yield number, row
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number} is not utf-8: byte 0x{line[error.start]:02x}; save it as UTF-8") from error
    except (ValueError, RecursionError) as error:
        hint = "; JSON lines have one object a line" if line.strip() in (b"[", b"{") else ""
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{path}:{number} is not JSON: {shorten(what)}{hint}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a gzip file, or a damaged one: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _kind(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"the value {shorten(repr(value), 40)}"


def _text(value: Any) -> str:
    """A value of JSON as text: a list as its values with spaces between them."""
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="replace").decode()  # an unpaired surrogate becomes ?
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(filter(None, map(_text, value)))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)


def _parquet(path: Path) -> Any:
    """The file, opened.

    Raises:
        DataError: If it is not a Parquet file.
    """
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path)
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} is not a Parquet file: {shorten(str(error).splitlines()[0])}") from error


def _read_parquet(path: Path, wanted: Sequence[str]) -> tuple[pd.DataFrame, Locate]:
    from pyarrow import ArrowException

    file = _parquet(path)
    try:
        table = file.read(columns=list(wanted))
        columns = {name: _arrow_text(table.column(name)) for name in wanted}
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {shorten(str(error).splitlines()[0])}") from error
    return pd.DataFrame(columns, dtype=str), lambda row: f"{path}, row {row + 1}"


def _arrow_text(column: Any) -> pd.Series:
    """A column of Arrow as text: whole numbers as they are, also beside missing values; lists as `_text`."""
    import pyarrow as pa

    column.validate(full=True)  # else text that is not UTF-8 is found where it is used
    kind = column.type
    if pa.types.is_nested(kind):
        return pd.Series([_text(value) for value in column.to_pylist()], dtype=str)
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        raise ValueError("a column has bytes instead of text")
    return column.cast(pa.large_string()).fill_null("").to_pandas().astype(str)
