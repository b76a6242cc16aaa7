"""Checks of hyper-parameters, worded for the user."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fellrec.errors import ConfigError, unknown


def check_number(
    name: str,
    value: object,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
) -> float:
    """A finite number of at least ``minimum``, or greater than ``above``, and at most ``maximum``.

    Raises:
        ConfigError: If it is not.

    Example:
        >>> check_number("alpha", 0.7, minimum=0)
        0.7
    """
    allowed = f"of at least {minimum}" if minimum is not None else f"greater than {above}"
    allowed += f" and at most {maximum}" if maximum is not None else ""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if is_number:
        number = float(value)  # type: ignore[arg-type]
        is_low_enough = maximum is None or number <= maximum
        if (minimum is None or number >= minimum) and (above is None or number > above) and is_low_enough:
            return number
    raise ConfigError(f"aggregation.{name} is {value!r}; allowed is a finite number {allowed}")


def check_flag(name: str, value: object) -> bool:
    """``True`` or ``False``.

    Raises:
        ConfigError: If it is anything else.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"aggregation.{name} is {value!r}; allowed are true and false")
    return value


def check_choice(name: str, value: object, choices: Sequence[str]) -> str:
    """One of ``choices``.

    Raises:
        ConfigError: If it is none of them; the nearest come first.
    """
    if value not in choices:
        raise ConfigError(unknown(f"aggregation.{name}", value, choices))
    return str(value)
