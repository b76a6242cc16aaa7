"""Standard error: what a command is doing. ``--quiet`` leaves it out; errors and warnings are shown by other means."""

from __future__ import annotations

import sys

from rich.console import Console

_quiet = False


def be_quiet(is_quiet: bool) -> None:
    """Let this process show nothing here from now on, or again what it does."""
    global _quiet  # noqa: PLW0603
    _quiet = is_quiet


def is_shown() -> bool:
    """Whether anything is shown."""
    return not _quiet


def tell(text: str) -> None:
    """Write a line, or several."""
    if not _quiet:
        sys.stderr.write(f"{text}\n")


def console() -> Console:
    """For progress bars and lines."""
    return Console(stderr=True, markup=False, emoji=False, highlight=False, quiet=_quiet)


def duration(seconds: float) -> str:
    """A duration for people, rounded.

    Example:
        >>> duration(8.2), duration(95), duration(3700), duration(30 * 3600)
        ('8 s', '2 min', '1 h 2 min', '30 h')
    """
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, rest = divmod(minutes, 60)
    return f"{hours} h" if hours >= 10 or not rest else f"{hours} h {rest} min"
