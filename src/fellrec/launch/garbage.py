"""Python's garbage collector while a command starts.

Imports make a million objects that stay. With the usual limits a seventh of their time is passes that find nothing.
"""

from __future__ import annotations

import gc

_IMPORTING = (50_000, 10, 10)
_USUAL = gc.get_threshold()


def begin_imports() -> None:
    """Look for garbage rarely, until `end_imports`."""
    gc.set_threshold(*_IMPORTING)


def end_imports() -> None:
    """After `begin_imports`, before models are loaded: look as often as usual, but not at what has been imported."""
    if gc.get_threshold()[0] == _IMPORTING[0]:  # Python 3.14 keeps none of the others
        gc.freeze()
        gc.set_threshold(*_USUAL)
