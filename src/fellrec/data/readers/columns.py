"""Which column of a table means what: the one that is named, or one with a usual name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fellrec.errors import DataError, shorten, unknown

USUAL: Mapping[str, Sequence[str]] = {
    "user": ("user_id", "user", "reviewer_id", "customer_id"),
    "item": ("item_id", "item", "movie_id", "product_id", "track_id", "parent_asin", "asin"),
    "time": ("timestamp", "time", "datetime", "date", "played_at", "unix_review_time"),
    "rating": ("rating", "stars", "overall", "label"),
    "title": ("title", "name", "item_name", "movie_title", "product_name", "track_name"),
    "genre": ("genre", "genres", "category", "categories"),
}
"""The names that are tried for each meaning, in this order, in any spelling."""


def find_column(meaning: str, given: str | None, names: Sequence[str], path: Path, setting: str = "") -> str | None:
    """The column with a meaning, if there is one.

    Args:
        meaning: A key of `USUAL`.
        given: The name that the user gave; ``None`` tries the usual ones.
        names: The columns of the file.
        path: The file, for the message.
        setting: The setting that gives the name, for the message; by default ``data.columns`` with the meaning.

    Raises:
        DataError: If the file does not have the given column.

    Example:
        >>> find_column("user", None, ["Item ID", "User ID"], Path("plays.csv"))
        'User ID'
    """
    if given is not None:
        if given not in names:
            raise DataError(f"{path}: {unknown(setting or f'data.columns.{meaning}', given, names)}")
        return given
    spelled = {_letters(name): name for name in reversed(names)}
    return next((spelled[_letters(name)] for name in USUAL[meaning] if _letters(name) in spelled), None)


def need_column(meaning: str, given: str | None, names: Sequence[str], path: Path, setting: str = "") -> str:
    """The column with a meaning, see `find_column`.

    Raises:
        DataError: If there is none; it names the columns that the file has.
    """
    found = find_column(meaning, given, names, path, setting)
    if found is None:
        key = setting or f"data.columns.{meaning}"
        raise DataError(
            f"{path} has no column {', '.join(USUAL[meaning])}; it has {shorten(', '.join(names))}: give the one with "
            f"the {meaning} as {key}=NAME"
        )
    return found


def _letters(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
