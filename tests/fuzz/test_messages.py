"""Damaged messages: each is a message whose fields have their declared types, or one clear error."""

from __future__ import annotations

import dataclasses
import json
import random
import resource
import time
import typing
from functools import cache
from typing import Any

import torch
from fuzz.mutations import changed, damaged, inputs
from message_examples import EXAMPLES
from pydantic import ConfigDict, TypeAdapter

from fellrec.distributed.message import Message, decode, encode, header_of, read_header
from fellrec.errors import SplitError

MOST_BYTES = 1 << 20


def received(content: bytes) -> Message:
    """What a channel makes of a header; the tensors are empty memory of the announced shapes."""
    plain, specs = read_header(content, MOST_BYTES)
    return decode(plain, [torch.zeros(shape, dtype=dtype) for dtype, shape in specs])


def sent(source: random.Random) -> bytes:
    """A message with a few of its values, or a few of its bytes, damaged."""
    message = source.choice(EXAMPLES)
    content = header_of(*encode(message))
    if source.random() < 0.3:
        return damaged(content, source)
    values = json.loads(content)
    for _ in range(source.choice((1, 1, 2))):
        values = changed(values, source)
    return json.dumps(values).encode()


@cache
def declared(kind: type, name: str) -> TypeAdapter[Any]:
    """Another library's reading of a field's type; lists and numbers of other types are not converted."""
    hint = typing.get_type_hints(kind)[name]
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True, strict=True))


def outcome(content: bytes) -> str:
    """``message`` or ``refused``."""
    try:
        message = received(content)
    except SplitError as error:
        return "refused" if len(str(error)) < 1000 else "too long"
    for field in dataclasses.fields(message):
        declared(type(message), field.name).validate_python(getattr(message, field.name))
    return "message"


def test_a_damaged_message_is_refused_or_has_the_declared_types() -> None:
    outcomes = {"message": 0, "refused": 0, "too long": 0}
    slowest = 0.0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for source in inputs(1500):
        content = sent(source)
        started = time.perf_counter()
        outcomes[outcome(content)] += 1
        slowest = max(slowest, time.perf_counter() - started)
    print(outcomes)
    assert outcomes["refused"] > outcomes["message"] > 0
    assert outcomes["too long"] == 0
    assert slowest < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "kilobytes"
