"""The one message format of all processes: frozen records of plain values and tensors.

Whatever arrives is data: a header of JSON with known limits names a class of this package and the values of its fields,
each of which must have the type that the class declares. Nothing else is made from it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from fellrec.errors import FellrecError, SplitError
from fellrec.functional.packing import Packed

PROTOCOL_VERSION = 5
"""Increase it when a message changes; processes with different versions refuse each other."""

LARGEST_HEADER = 1 << 24
"""Bytes of the values of a message without its tensors."""
_MOST_TENSORS, _MOST_DIMENSIONS = 1 << 17, 8
_LARGEST_INTEGER = 1 << 63
_LONGEST_PROBLEM = 300
"""Characters of what another process sent that an error message may have."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool)
}
"""Types of tensors that can be sent."""

TensorSpec = tuple[torch.dtype, tuple[int, ...]]
"""Type and shape."""


@dataclass(frozen=True)
class Message:
    """Base of all messages. A subclass checks its contents when it is made, on either side."""


@dataclass(frozen=True)
class Abort(Message):
    """The sender ends the run.

    Attributes:
        reason: One sentence for the user.
    """

    reason: str


@dataclass(frozen=True)
class Stop(Message):
    """The command is over; ``Done`` answers."""


@dataclass(frozen=True)
class Done(Message):
    """What was asked for is done."""


def require(message: Message, holds: bool, problem: str) -> None:
    """Refuse the contents of a message.

    Raises:
        SplitError: If ``holds`` is false; names the message, and its client if it has one.
    """
    if not holds:
        client = getattr(message, "client", None)
        where = "" if client is None else f" of client {client} in round {getattr(message, 'round_index', None)}"
        raise SplitError(f"{type(message).__name__}{where}: {problem[:_LONGEST_PROBLEM]}")


@contextmanager
def reading(message: Message) -> Iterator[None]:
    """While this lasts, the contents of a message from another process are used.

    Raises:
        SplitError: In place of whatever a tensor that is missing or of another shape leads to.
    """
    try:
        yield
    except FellrecError:
        raise
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SplitError(f"{type(message).__name__} cannot be used: {text}") from error


def encode(message: Message) -> tuple[dict[str, Any], list[Tensor]]:
    """A message as plain values and tensors; ``decode`` reads it.

    Returns:
        JSON-ready values in which a tensor is ``{"tensor": position}``, and the tensors.
    """
    tensors: list[Tensor] = []
    return _plain(message, tensors), tensors


def header_of(plain: Mapping[str, Any], tensors: Sequence[Tensor]) -> bytes:
    """The header that announces what `encode` made; `read_header` reads it."""
    specs = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
    return json.dumps({**plain, "tensors": specs}).encode()


def read_header(content: bytes, most_bytes: int) -> tuple[dict[str, Any], list[TensorSpec]]:
    """Read what `header_of` made, before memory is taken for the tensors that follow it.

    Args:
        content: The header.
        most_bytes: Largest size of all tensors together.

    Returns:
        The plain values for `decode`, and type and shape of each tensor.

    Raises:
        SplitError: If it is not such a header, or announces more than is allowed.
    """
    try:
        plain = json.loads(content)
        given = plain.pop("tensors")
        if not isinstance(given, list) or len(given) > _MOST_TENSORS:
            raise ValueError(f"its tensors are not a list of at most {_MOST_TENSORS}")
        specs = [_spec(item) for item in given]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise SplitError(f"malformed message: {str(error)[:_LONGEST_PROBLEM]}") from error
    size = sum(spec_bytes(spec) for spec in specs)
    if size > most_bytes:
        raise SplitError(f"malformed message: it announces {size:.3g} bytes, allowed are {most_bytes:.3g}")
    return plain, specs


def spec_bytes(spec: TensorSpec) -> int:
    """Bytes of a tensor."""
    dtype, shape = spec
    return dtype.itemsize * math.prod(shape)


def decode(plain: Mapping[str, Any], tensors: Sequence[Tensor]) -> Message:
    """Read what ``encode`` made.

    Raises:
        SplitError: If the type of message is unknown, or its contents are not valid.
    """
    name = plain.get("type")
    kind = _kinds().get(name) if isinstance(name, str) else None
    if kind is None:
        raise SplitError(f"unknown message {_short(name)}")
    try:
        values = {key: _decode(value, tensors) for key, value in plain["fields"].items()}
        for key, hint in _hints(kind.__name__).items():
            if key in values and not _fits(values[key], hint):
                raise TypeError(f"{key} is not of the type {hint}")
        return kind(**values)
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise SplitError(f"malformed message {name}: {str(error)[:_LONGEST_PROBLEM]}") from error


def _subclasses(cls: type[Message]) -> list[type[Message]]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]


def _kinds() -> dict[str, type[Message]]:
    return {cls.__name__: cls for cls in _subclasses(Message)}


@cache
def _hints(name: str) -> dict[str, Any]:
    """The declared types of a message's fields."""
    return get_type_hints(_kinds()[name])


def _spec(given: Any) -> TensorSpec:
    name, shape = given
    if name not in DTYPES:
        raise ValueError(f"a tensor of the unknown type {_short(name)}")
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"a tensor of the shape {_short(shape)}")
    if not all(type(length) is int and 0 <= length < _LARGEST_INTEGER for length in shape):
        raise ValueError(f"a tensor of the shape {_short(shape)}")
    return DTYPES[name], tuple(shape)


def _short(value: Any) -> str:
    return repr(value)[:100]


def _plain(message: Message, tensors: list[Tensor]) -> dict[str, Any]:
    values = {item.name: _encode(getattr(message, item.name), tensors) for item in fields(message)}
    return {"type": type(message).__name__, "fields": values}


def _encode(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Message):
        return {"message": _plain(value, tensors)}
    if isinstance(value, Tensor):
        tensors.append(value.detach().contiguous())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Packed):
        return {"packed": [_encode(value.codes, tensors), _encode(value.scale, tensors)]}
    if isinstance(value, Mapping):
        return {"map": {key: _encode(item, tensors) for key, item in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    return value


def _decode(value: Any, tensors: Sequence[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((form, content),) = value.items()
    match form:
        case "message":
            return decode(content, tensors)
        case "tensor":
            if type(content) is not int or not 0 <= content < len(tensors):
                raise ValueError(f"tensor {_short(content)} of {len(tensors)}")
            return tensors[content]
        case "packed":
            codes, scale = (_decode(item, tensors) for item in content)
            if not isinstance(codes, Tensor) or not isinstance(scale, Tensor | NoneType):
                raise TypeError("a packed tensor of other values")
            return Packed(codes, scale)
        case "map":
            return {key: _decode(item, tensors) for key, item in content.items()}
        case "tuple":
            return tuple(_decode(item, tensors) for item in content)
    raise ValueError(f"unknown form {_short(form)}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a decoded value is what a field is declared as."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is tuple:  # of any length
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if origin is not None:
        return isinstance(value, dict) and all(_fits(item, arguments[1]) for item in value.values())
    if hint is int:
        return type(value) is int and -_LARGEST_INTEGER <= value < _LARGEST_INTEGER
    return type(value) in (int, float) if hint is float else isinstance(value, hint)
