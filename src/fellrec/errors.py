"""Exceptions for user errors. The CLI prints their message and exits with a non-zero status."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from fellrec.functional.secrets import redact

_LONGEST_NAME, _MOST_NAMES = 80, 100
"""Limits of choices in a message, which may come from a file."""
_FIRST_LETTERS, _LAST_LETTERS = 2000, 800
"""What is kept of a long message: one that repeats a value of a file or another library's text."""
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What a terminal does not print but obeys; line breaks and tabs are part of messages."""


class FellrecError(Exception):
    """Base class of all user errors; the message has no passwords and can be printed, see `printable`.

    Args:
        message: What was wrong, the value, and what is allowed.

    Attributes:
        already_reported: Whether another process of the run prints the message.
    """

    already_reported = False

    def __init__(self, message: str = "") -> None:
        text = printable(redact(str(message)))
        if len(text) > _FIRST_LETTERS + _LAST_LETTERS:
            text = f"{text[:_FIRST_LETTERS]} […] {text[-_LAST_LETTERS:]}"
        super().__init__(text)


class ConfigError(FellrecError):
    """A setting is unknown, of the wrong type, or out of range."""


class DataError(FellrecError):
    """A data file or the interactions in it cannot be used."""


class LeakError(DataError):
    """Held-out targets would be used in training, in the input of an evaluation or for selection."""


class BackboneError(FellrecError):
    """A backbone, its split or its adapter cannot be built."""


class TrainingError(FellrecError):
    """Training cannot continue; the last valid state is kept."""


class StorageError(FellrecError):
    """A file cannot be written: the disk is full, or the permission is missing."""


class CheckpointError(FellrecError):
    """A checkpoint is damaged or incomplete."""


class SplitError(TrainingError):
    """Communication between processes failed: unexpected message, different version, or lost process."""


class Preempted(KeyboardInterrupt):
    """The run was preempted and can be resumed. Like Ctrl-C, it does not count as a failure.

    Args:
        message: Cause and place of the interruption.
        exit_code: Exit code of the process.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def printable(text: str) -> str:
    """Escape control characters, such as those of a terminal's commands, in a text that may come from a file.

    Example:
        >>> print(printable("a\x1b[2Jb"))
        a\\x1b[2Jb
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def shorten(text: str, most: int = 200) -> str:
    """Cut a text from a file for an error message.

    Example:
        >>> shorten("abcdef", most=4)
        'abc…'
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"


def nearest_first(value: str, choices: Iterable[str]) -> list[str]:
    """Sort ``choices`` for an error message: close matches of ``value`` first, the others by name.

    Example:
        >>> nearest_first("fedavgg", ["local", "fellrec", "fedavg"])
        ['fedavg', 'fellrec', 'local']
    """
    names = sorted(str(choice) for choice in choices)
    close = get_close_matches(value, names, n=len(names) or 1, cutoff=0.6)
    return close + [name for name in names if name not in close]


def unknown(kind: str, value: object, choices: Iterable[str]) -> str:
    """Format the error message for a name that is not in ``choices``.

    Example:
        >>> unknown("aggregation", "fedavgg", ["local", "fedavg"])
        "unknown aggregation 'fedavgg'; choose from: fedavg, local"
    """
    names = [shorten(name, _LONGEST_NAME) for name in nearest_first(str(value), choices)]
    more = f" and {len(names) - _MOST_NAMES:,} others" if len(names) > _MOST_NAMES else ""
    return f"unknown {kind} {shorten(str(value))!r}; choose from: {', '.join(names[:_MOST_NAMES])}{more}"
