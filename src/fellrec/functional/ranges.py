"""What a setting may be, said by its type: checked when a dataclass of settings is made.

``rounds: Count = 10`` is a whole number of at least 1, ``Count | None`` allows null too, ``Literal["stop", "skip"]`` is
one of two words, and `bool`, `int`, `float` and `str` are what they say. Values of any other type are not checked here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from fellrec.errors import ConfigError, shorten

LARGEST = 2**31 - 1
"""Largest whole number where no other limit is named: larger ones do not fit into what they are used for."""


@dataclass(frozen=True)
class Allowed:
    """A range of values.

    Attributes:
        accepts: Whether a value is in the range.
        text: The range in words, for messages.
        is_open: Whether it has whole numbers up to `LARGEST`, which ``text`` does not say.
    """

    accepts: Callable[[Any], bool]
    text: str
    is_open: bool = False

    def text_for(self, value: Any) -> str:
        """The range in words, for the message about a value."""
        is_too_large = self.is_open and _is_whole(value) and value > LARGEST
        return f"{self.text}; at most {LARGEST}" if is_too_large else self.text


def whole(least: int, most: int | None = None) -> Allowed:
    """Whole numbers from ``least`` to ``most``, or to `LARGEST`.

    Example:
        >>> [whole(1).accepts(value) for value in (1, 0, 1.0, True, 10**30)]
        [True, False, False, False, False]
    """
    text = f"of at least {least}" if most is None else f"from {least} to {most}"
    largest = LARGEST if most is None else most
    return Allowed(
        lambda value: _is_whole(value) and least <= value <= largest, f"a whole number {text}", is_open=most is None
    )


def per_client(least: int, noun: str, example: str) -> Allowed:
    """A whole number, a list of them with that of each client, or numbers by a client's size.

    Args:
        least: The smallest number.
        noun: What they are, for messages.
        example: Numbers by size.

    Example:
        >>> ranks = per_client(1, "ranks", "{0: 4, 500: 8}")
        >>> [ranks.accepts(value) for value in (8, [4, 8], {0: 4, 500: 8}, 0, [], {500: 8})]
        [True, True, True, False, False, False]
    """
    one = whole(least)

    def accepts(value: Any) -> bool:
        """Whether all numbers are in the range, and every client has one."""
        if isinstance(value, Mapping):
            return 0 in value and all(map(whole(0).accepts, value)) and all(map(one.accepts, value.values()))
        return one.accepts(value) or (
            isinstance(value, (list, tuple)) and len(value) > 0 and all(map(one.accepts, value))
        )

    return Allowed(accepts, f"{one.text}, or a list of them, or {noun} by size such as {example}")


def number(accepts: Callable[[float], bool], text: str) -> Allowed:
    """Finite numbers for which ``accepts`` holds.

    Example:
        >>> [number(lambda x: x > 0, "a number above 0").accepts(value) for value in (0.5, 2, 0, float("nan"), "1")]
        [True, True, False, False, False]
    """
    return Allowed(lambda value: _is_number(value) and math.isfinite(value) and accepts(value), text)


def items(of: Allowed, text: str, distinct: bool = False, least: int = 1) -> Allowed:
    """Lists of at least ``least`` values of another range, each once if they are ``distinct``.

    Example:
        >>> [items(whole(1), "").accepts(value) for value in ([5, 10], [], [0], 5)]
        [True, False, False, False]
    """

    def accepts(value: Any) -> bool:
        """Whether a value is such a list."""
        is_each_allowed = _is_list(value) and len(value) >= least and all(map(of.accepts, value))
        return is_each_allowed and not (distinct and len(set(value)) < len(value))

    return Allowed(accepts, text)


def words(text: str, least: int = 1) -> Allowed:
    """Lists of at least ``least`` different words.

    Example:
        >>> [words("").accepts(value) for value in (["title", "genre"], [], ["title", "title"], [1], "title")]
        [True, False, False, False, False]
    """

    def accepts(value: Any) -> bool:
        """Whether a value is such a list."""
        is_text = _is_list(value) and len(value) >= least and all(isinstance(word, str) and word for word in value)
        return is_text and len(set(value)) == len(value)

    return Allowed(accepts, text)


def listed(text: str, of: type | tuple[type, ...] = object) -> Allowed:
    """Lists of values of some types, of anything by default."""
    return Allowed(lambda value: _is_list(value) and all(isinstance(part, of) for part in value), text)


def distinct(choices: Sequence[str]) -> Allowed:
    """Lists of some of ``choices``, each once.

    Example:
        >>> [distinct(("a", "b")).accepts(value) for value in (["b"], [], ["b", "b"], ["c"])]
        [True, True, False, False]
    """

    def accepts(value: Any) -> bool:
        """Whether a value is such a list."""
        return _is_list(value) and all(name in choices for name in value) and len(set(value)) == len(value)

    return Allowed(accepts, f"a list, each once, of {', '.join(choices)}")


def line(also: Callable[[str], bool] = lambda text: True, text: str = "one line of text") -> Allowed:
    """One line of text without control characters.

    Example:
        >>> [line().accepts(value) for value in ("büro (1)", "", "a\\nb", 5)]
        [True, False, False, False]
    """
    return Allowed(lambda value: isinstance(value, str) and value != "" and _is_plain(value) and also(value), text)


def _is_plain(text: str) -> bool:
    return all(ord(letter) >= 32 and letter not in "\x7f\x85\u2028\u2029" for letter in text)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


Natural = Annotated[int, whole(0)]
Seed = Annotated[int, whole(0, 2**32 - 1)]
"""What every generator of random numbers takes."""
Line = Annotated[str, line()]
Name = Annotated[str, line(lambda text: "/" not in text and text[0] != ".", "one line of text without /")]
"""A part of file names."""
Count = Annotated[int, whole(1)]
Positive = Annotated[float, number(lambda x: x > 0, "a number above 0")]
Seconds = Annotated[float, number(lambda x: 0 < x <= 1e9, "a number above 0, at most 1e9")]
NotNegative = Annotated[float, number(lambda x: x >= 0, "a number of at least 0")]
Fraction = Annotated[float, number(lambda x: 0 < x <= 1, "a number in (0, 1]")]
"""A fraction of something that must not be empty."""
Between0And1 = Annotated[float, number(lambda x: 0 < x < 1, "a number in (0, 1)")]
Rate = Annotated[float, number(lambda x: 0 <= x <= 1, "a number in [0, 1]")]
RateBelow1 = Annotated[float, number(lambda x: 0 <= x < 1, "a number in [0, 1)")]


def one_of(*choices: str) -> Allowed:
    """Some words.

    Example:
        >>> one_of("none", "linear", "cosine").text
        'none, linear or cosine'
    """
    return Allowed(lambda value: value in choices and not isinstance(value, bool), _alternatives(choices))


def check(settings: Any, group: str, *problems: str | None) -> None:
    """Refuse a dataclass with a value outside the range of its field.

    Args:
        settings: The dataclass; called in its ``__post_init__``.
        group: Where its fields are in a configuration, such as ``trainer``; empty for the root.
        problems: What else is wrong with it; ``None`` is nothing.

    Raises:
        ConfigError: With one line for each problem: the key, the value, what is allowed.

    Example:
        >>> @dataclass(frozen=True)
        ... class Mine:
        ...     steps: Count | None = None
        >>> check(Mine(3), "mine"), check(Mine(None), "mine")
        (None, None)
        >>> check(Mine(0), "mine")
        Traceback (most recent call last):
        fellrec.errors.ConfigError: mine.steps=0 is not allowed: a whole number of at least 1, or null
    """
    refuse(*out_of_range(type(settings), vars(settings), group), *problems)


def out_of_range(kind: type, values: Mapping[str, Any], group: str) -> list[str]:
    """What of some values of a dataclass's fields is outside the range of its field, one line each."""
    return [
        not_allowed(f"{group}.{name}" if group else name, values[name], allowed.text_for(values[name]))
        for name, allowed in ranges(kind).items()
        if name in values and not allowed.accepts(values[name])
    ]


def refuse(*problems: str | None) -> None:
    """Raise one error for all reasons that are not ``None``.

    Raises:
        ConfigError: With one line for each, if there are any.
    """
    if found := [problem for problem in problems if problem]:
        raise ConfigError("\n".join(found))


def not_allowed(key: str, value: Any, allowed: str) -> str:
    """Phrase the message for a value outside its range.

    Example:
        >>> not_allowed("trainer.num_rounds", 0, "a whole number of at least 1")
        'trainer.num_rounds=0 is not allowed: a whole number of at least 1'
    """
    return f"{key}={_shown(value)} is not allowed: {allowed}"


def _shown(value: Any) -> str:
    """A value as it is written in an override, on one line and not longer than one."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        value = list(value)
    text = str(value)
    is_like_a_number = isinstance(value, str) and re.fullmatch(r"[-+.\d_e]*\d[-+.\d_e]*", value, re.IGNORECASE)
    return shorten(text if _is_plain(text) and not is_like_a_number else repr(text))


@cache
def ranges(kind: type) -> Mapping[str, Allowed]:
    """The range of each field of a dataclass that has one, by name.

    A class derived from a dataclass has its ranges, whatever its other bases say of attributes of the same names.
    """
    declaring = next(base for base in kind.__mro__ if "__dataclass_fields__" in vars(base))
    hints = get_type_hints(declaring, include_extras=True)
    found = {field.name: range_of(hints[field.name]) for field in fields(kind)}
    return {name: allowed for name, allowed in found.items() if allowed is not None}


def range_of(hint: Any) -> Allowed | None:
    """What a type allows; ``None`` for anything."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    if get_origin(hint) is Annotated:
        return next((extra for extra in get_args(hint)[1:] if isinstance(extra, Allowed)), None)
    if get_origin(hint) is Literal:
        return one_of(*get_args(hint))
    return _any_of(get_args(hint)) if get_origin(hint) in (Union, UnionType) else None


_PLAIN: Mapping[Any, Allowed] = {
    bool: Allowed(lambda value: isinstance(value, bool), "true or false"),
    int: Allowed(lambda value: _is_whole(value) and abs(value) <= LARGEST, "a whole number", is_open=True),
    float: number(lambda value: True, "a number"),
    str: Allowed(lambda value: isinstance(value, str), "text"),
    Sequence[str]: Allowed(lambda value: _is_list(value) and all(isinstance(word, str) for word in value), "a list"),
}


def _any_of(hints: Sequence[Any]) -> Allowed | None:
    """What at least one of several types allows."""
    of_types = [range_of(hint) for hint in hints if hint is not NoneType]
    known = [allowed for allowed in of_types if allowed is not None]
    if len(known) < len(of_types):
        return None
    allows_null = NoneType in hints
    text = ", or ".join([*(allowed.text for allowed in known), *(["null"] if allows_null else [])])
    return Allowed(
        lambda value: (value is None and allows_null) or any(allowed.accepts(value) for allowed in known),
        text,
        any(allowed.is_open for allowed in known),
    )


def _alternatives(choices: Sequence[Any]) -> str:
    *first, last = map(str, choices)
    return f"{', '.join(first)} or {last}" if first else last
