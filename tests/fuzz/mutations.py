"""Damaged copies of good content, the same for the same seed; and how many of them a test tries."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

_JUNK = (b"", b"\0", b"\xff\xfe", b"{}", b"[]", b"null", b"NaN", b"1e999", b"-1", b"9" * 400, b'"', b"\n", b"[" * 3000)
_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 2**31, 2**63, -(2**70), 1e308, float("nan"), "", "x", "\0", "../../etc", "x" * 5000,
    [], {}, [[]], {"": {}}, [1] * 2000,
)  # fmt: skip


def inputs(count: int) -> Iterator[random.Random]:
    """A source of random numbers for each input: ``count``, or as many as fit into FELLREC_FUZZ_SECONDS."""
    seconds, started, number = float(os.environ.get("FELLREC_FUZZ_SECONDS", "0")), time.monotonic(), 0
    while time.monotonic() - started < seconds if seconds else number < count:
        yield random.Random(number)
        number += 1


def damaged(content: bytes, source: random.Random) -> bytes:
    """Some bytes changed, cut, added or repeated."""
    for _ in range(source.choice((1, 1, 1, 2, 5))):
        content = source.choice(_CHANGES)(content, source)
    return content


def changed(value: Any, source: random.Random) -> Any:
    """A value of JSON with one of its parts removed, replaced or added; a copy."""
    if isinstance(value, (dict, list)) and value and source.random() < 0.8:
        key = source.choice(list(value) if isinstance(value, dict) else range(len(value)))
        copy: Any = value.copy()
        action = source.random()
        if action < 0.1:
            del copy[key]
        elif action < 0.15 and isinstance(copy, dict):
            copy[source.choice(("x", "type", "tensor", "map", "_target_", "1"))] = source.choice(_VALUES)
        else:
            copy[key] = changed(value[key], source)
        return copy
    return source.choice(_VALUES)


def _flip(content: bytes, source: random.Random) -> bytes:
    if not content:
        return b"\1"
    at = source.randrange(len(content))
    return content[:at] + bytes([content[at] ^ (1 << source.randrange(8))]) + content[at + 1 :]


def _cut(content: bytes, source: random.Random) -> bytes:
    return content[: source.randrange(len(content) + 1)]


def _insert(content: bytes, source: random.Random) -> bytes:
    at = source.randrange(len(content) + 1)
    return content[:at] + source.choice(_JUNK) + content[at:]


def _overwrite(content: bytes, source: random.Random) -> bytes:
    at, length = source.randrange(len(content) + 1), source.randrange(1, 64)
    return content[:at] + source.randbytes(length) + content[at + length :]


def _repeat(content: bytes, source: random.Random) -> bytes:
    at = source.randrange(len(content) + 1)
    return content[:at] + content[at : at + source.randrange(1, 256)] * 2 + content[at:]


_CHANGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _flip, _cut, _insert, _overwrite, _repeat)
