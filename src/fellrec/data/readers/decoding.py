"""The text of a file: its encoding, and files that are not text."""

from __future__ import annotations

import codecs
import gzip
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

from fellrec.data.files import GZIP
from fellrec.errors import DataError

UTF8 = ("utf-8",)
UTF8_OR_LATIN1 = ("utf-8", "latin-1")
"""Of files that are published as latin-1: copies of them are often saved as UTF-8."""

_UTF8_LETTER = re.compile(rb"[\xc3-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}")
_WIDE = {
    "utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),  # before utf-16, whose mark is the beginning of this one
    "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}
_COMPRESSED = {
    "a gzip file": b"\x1f\x8b\x08",
    "a zip archive (or an Excel file)": b"PK\x03\x04",
    "an xz file": b"\xfd7zXZ\0",
    "a Zstandard file": b"\x28\xb5\x2f\xfd",
    "a 7z archive": b"7z\xbc\xaf\x27\x1c",
    "a Parquet file": b"PAR1\x15",
    "an HDF5 file": b"\x89HDF\r\n",
    "an SQLite file": b"SQLite format 3\0",
}
"""What files begin with that are often taken for a text."""


def lines_of_text(path: Path, encodings: Sequence[str]) -> list[str]:
    """The lines of a text file, without those at the end that are empty.

    A line ends with a line feed, or with a carriage return and a line feed; in a file without line feeds, with a
    carriage return.

    Args:
        path: The file.
        encodings: As for `decode`.

    Raises:
        DataError: As for `decode`; and if the file is empty.
    """
    text = decode(path, encodings).replace("\r\n", "\n")
    if "\n" not in text:
        text = text.replace("\r", "\n")
    lines = text.split("\n")  # splitlines would also break at latin-1's 0x85
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{path} is empty")
    return lines


def decode(path: Path, encodings: Sequence[str]) -> str:
    """The text of a file, without a byte order mark; one of UTF-16 or UTF-32 decides the encoding.

    Args:
        path: The file; decompressed if its name ends with ``.gz``.
        encodings: The first that fits is used; only the last may fit any bytes.

    Raises:
        DataError: If it cannot be read, is not text, or has none of the encodings; names the first line that is wrong.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == GZIP:
            raw = gzip.decompress(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a gzip file, or a damaged one: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    refuse_other_kinds(path, raw)
    for encoding, marks in _WIDE.items():
        if raw.startswith(marks):
            return _of_wide(path, raw, encoding)
    if raw.count(b"\0") > len(raw) // 4:
        raise DataError(f"{path} is not a text in {encodings[0]}: it has {raw.count(0)} null bytes; save it as UTF-8")
    return _of_bytes(path, raw, encodings)


def refuse_other_kinds(path: Path, raw: bytes) -> None:
    """Refuse what is often taken for a text.

    Args:
        path: The file.
        raw: Its content, or the beginning of it.

    Raises:
        DataError: Naming what it is.
    """
    for name, mark in _COMPRESSED.items():
        if raw.startswith(mark):
            raise DataError(f"{path} is {name}, not a text; decompress it or save it as text in utf-8")


def _of_wide(path: Path, raw: bytes, encoding: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not {encoding}, as its byte order mark says: {error.reason}") from error


def _of_bytes(path: Path, raw: bytes, encodings: Sequence[str]) -> str:
    try:
        return raw.removeprefix(codecs.BOM_UTF8).decode(encodings[0])
    except UnicodeDecodeError as error:
        is_mixed = bool(_UTF8_LETTER.search(raw))
        if len(encodings) > 1 and not is_mixed:
            return raw.decode(encodings[1])
        start = error.start + len(raw) - len(error.object)
        line = raw[:start].count(b"\n") + 1
        also = f", but other letters are, so it is not {encodings[1]}" if len(encodings) > 1 else ""
        raise DataError(
            f"{path}:{line} is not {encodings[0]}: byte 0x{raw[start]:02x}{also}; save it as UTF-8"
        ) from error
