"""The one message format of all processes: frozen records of plain values and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from fellrec.errors import SplitError
from fellrec.functional.packing import Packed

PROTOCOL_VERSION = 2
"""Increase it when a message changes; processes with different versions refuse each other."""


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


def _subclasses(cls: type[Message]) -> list[type[Message]]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]


def encode(message: Message) -> tuple[dict[str, Any], list[Tensor]]:
    """A message as plain values and tensors; ``decode`` reads it.

    Returns:
        JSON-ready values in which a tensor is ``{"tensor": position}``, and the tensors.
    """
    tensors: list[Tensor] = []
    values = {item.name: _encode(getattr(message, item.name), tensors) for item in fields(message)}
    return {"type": type(message).__name__, "fields": values}, tensors


def decode(plain: Mapping[str, Any], tensors: list[Tensor]) -> Message:
    """Read what ``encode`` made.

    Raises:
        SplitError: If the type of message is unknown, or its contents are not valid.
    """
    known = {cls.__name__: cls for cls in _subclasses(Message)}
    if plain.get("type") not in known:
        raise SplitError(f"unknown message {plain.get('type')!r}")
    try:
        return known[plain["type"]](**{key: _decode(value, tensors) for key, value in plain["fields"].items()})
    except (TypeError, KeyError, IndexError) as error:
        raise SplitError(f"malformed message {plain['type']}: {error}") from error


def _encode(value: Any, tensors: list[Tensor]) -> Any:
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


def _decode(value: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "packed" in value:
        codes, scale = (_decode(item, tensors) for item in value["packed"])
        return Packed(codes, scale)
    if "map" in value:
        return {key: _decode(item, tensors) for key, item in value["map"].items()}
    return tuple(_decode(item, tensors) for item in value["tuple"])
