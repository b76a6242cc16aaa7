"""Damaged messages: each is a message whose fields have their declared types, or one clear error."""

from __future__ import annotations

import dataclasses
import json
import random
import typing
from functools import cache
from typing import Any

import torch
from fuzz.mutations import changed, damaged, inputs
from fuzz.outcomes import OK, REFUSED, Outcomes
from message_examples import EXAMPLES
from pydantic import ConfigDict, TypeAdapter

from fellrec.distributed.message import Message, decode, encode, header_of, read_header

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


def check_types(message: Message) -> str:
    for field in dataclasses.fields(message):
        declared(type(message), field.name).validate_python(getattr(message, field.name))
    return OK


def test_a_damaged_message_is_refused_or_has_the_declared_types() -> None:
    with Outcomes("messages", letters=1000) as outcomes:
        for source in inputs(1500):
            content = sent(source)
            outcomes.of(lambda content=content: received(content), content, check_types)
    assert outcomes.found[REFUSED] > outcomes.found[OK] > 0
