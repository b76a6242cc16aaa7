"""Overrides as Hydra's grammar reads them; the value of a setting that is text needs no quotes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException

from fellrec.config.members import alone
from fellrec.config.paths import group_choices
from fellrec.config.registry import CHOICES, GROUPS, OF_CHOICE
from fellrec.errors import ConfigError, unknown
from fellrec.functional.quoting import hydra_quoted, hydra_value

_ASSIGNMENT = re.compile(r"(?P<key>\+{0,2}[A-Za-z_][\w/-]*(?:\.[\w-]+)*)=(?P<value>.*)", re.DOTALL | re.ASCII)
_DELETION = re.compile(r"~[A-Za-z_][\w/-]*(?:\.[\w-]+)*(?:=.*)?", re.DOTALL | re.ASCII)
_NEARLY = re.compile(r"-*(?P<key>[A-Za-z_][\w./-]*)\s*(?::=|[:= ])\s*(?P<value>\S.*)", re.ASCII)
"""An assignment with another separator, or written as an option."""


def parse(overrides: Sequence[str]) -> list[Override]:
    """The overrides as Hydra reads them; ``input_line`` is quoted where that was missing.

    Raises:
        ConfigError: For a malformed override.
    """
    return [_read(text) for text in overrides]


def _read(text: str) -> Override:
    found = _ASSIGNMENT.fullmatch(text)
    if not found and not _DELETION.fullmatch(text):
        raise ConfigError(_malformed(text))
    key, value = (found["key"], found["value"]) if found else (text, "")
    is_text = alone(key.lstrip("+")) in text_settings()
    try:
        item = _parsed(text)
    except HydraException as error:
        if not found:
            raise ConfigError(f"cannot read the override {text!r}") from error
        if not is_text:
            hint = _shell_quoted(f"{key}={hydra_value(value)}")
            raise ConfigError(f"cannot read the value of {text}: as text it must be quoted, {hint}") from error
        return _parsed(f"{key}={hydra_quoted(value)}")
    _check_group(item, value)
    if is_text and not item.is_sweep_override() and not isinstance(item.value(), (str, QuotedString, NoneType)):
        return _parsed(f"{key}={hydra_quoted(value)}")
    return item


def _parsed(text: str) -> Override:
    (item,) = OverridesParser.create().parse_overrides([text])
    return item


def _shell_quoted(text: str) -> str:
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'


def _malformed(text: str) -> str:
    nearly = _NEARLY.fullmatch(text)
    example = f"{nearly['key']}={nearly['value']}" if nearly else ""
    if not _ASSIGNMENT.fullmatch(example):
        example = "trainer.num_rounds=3"
    return f"cannot read the override {text!r}: overrides are KEY=VALUE, such as {example}"


def _check_group(item: Override, value: str) -> None:
    """Refuse what is not a choice where a choice is made, and a group that is left out."""
    choices = group_choices().get(item.key_or_group)
    if choices is None or item.is_sweep_override():
        return
    if item.is_delete():
        raise ConfigError(f"~{item.key_or_group} is not allowed: {item.key_or_group} cannot be left out")
    if not isinstance(item.value(), (str, list)):  # Hydra does not come to an end with a mapping
        raise ConfigError(unknown(item.key_or_group, value, choices))


@cache
def text_settings() -> frozenset[str]:
    """Keys of all settings that are text: names and paths, which may have any characters."""
    kinds = [
        *GROUPS.items(),
        *((group, kind) for (group, _), kind in OF_CHOICE.items()),
        *((key, kind) for key, kinds in CHOICES.items() for kind in kinds.values()),
    ]
    return frozenset(f"{key}.{name}" if key else name for key, kind in kinds for name in _texts(kind))


def _texts(kind: type) -> Iterator[str]:
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        if is_dataclass(nested := hints[field.name]):
            yield from (f"{field.name}.{name}" for name in _texts(nested))  # type: ignore[arg-type]
        types = [hint for hint in _alternatives(hints[field.name]) if hint is not NoneType]
        if types == [str]:
            yield field.name


def _alternatives(hint: Any) -> list[Any]:
    """The types of a union, without what is said about them."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [part for inner in get_args(hint) for part in _alternatives(inner)]
    return [hint]
