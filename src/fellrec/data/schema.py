"""Interactions and catalogue: what a reader hands over, and the checks that all data pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import pandas as pd

from fellrec.data.ragged import IntArray
from fellrec.data.settings import DataSettings
from fellrec.errors import ConfigError, DataError, unknown

Locate = Callable[[int], str]
"""Row of a frame → ``file:line``, for messages."""

TEXT_STYLES = ("plain", "key_value")


@dataclass(frozen=True)
class RawData:
    """What a reader found, unchecked.

    Attributes:
        interactions: Columns ``user_id`` and ``item_id`` (text) and ``timestamp`` (float), in file order.
        items: Columns ``item_id`` and ``title`` (text) and any attributes (text).
        users: Column ``user_id`` (text) and any attributes.
        where_interaction: Row of ``interactions`` → ``file:line``.
        where_item: Row of ``items`` → ``file:line``.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame
    where_interaction: Locate = field(default=lambda row: f"interaction {row}")
    where_item: Locate = field(default=lambda row: f"item {row}")


class Reader(Protocol):
    """What ``data.reader`` provides."""

    def read(self) -> RawData:
        """Read everything."""

    def fingerprint(self) -> str:
        """A hash of all that ``read`` depends on."""


@dataclass(frozen=True)
class Catalogue:
    """The items, by index.

    Attributes:
        item_ids: The ids of the data set.
        titles: One title per item; a title is not an id.
        attributes: One row per item; text columns such as ``genre``.
    """

    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    attributes: pd.DataFrame

    def __len__(self) -> int:
        return len(self.item_ids)

    def texts(self, fields: Sequence[str] = ("title", "genre"), style: str = "plain") -> list[str]:
        """Each item's fields (``item_id``, ``title``, attributes) joined by a space; absent fields are left out.

        Args:
            fields: Names of fields, in the order in which they are written.
            style: ``"plain"`` writes values only, ``"key_value"`` writes ``title: Heat genre: Crime``, as RecFormer
                does (Li et al. 2023, section 2.1), and leaves out the names of values that are missing.

        Raises:
            ConfigError: If the data set has none of the fields, or the style is unknown.
        """
        if style not in TEXT_STYLES:
            raise ConfigError(unknown("objective.text", style, TEXT_STYLES))
        own = {"item_id": pd.Series(self.item_ids, dtype=object), "title": pd.Series(self.titles, dtype=object)}
        columns = {**own, **dict(self.attributes.items())}
        present = {name: columns[name] for name in fields if name in columns}
        if not present:
            raise ConfigError(unknown("item field", ", ".join(fields), columns))
        if style == "key_value":
            written = [_with_key(name, column) for name, column in present.items()]
            return written[0].str.cat(written[1:]).str.strip().tolist()
        first, *others = present.values()
        joined = first.astype(str)
        for column in others:
            joined = joined.str.cat(column.fillna("").astype(str), sep=" ")
        return joined.str.strip().tolist()

    @cached_property
    def title_groups(self) -> IntArray:
        """``[I]`` int64; items with the same title share a number."""
        return pd.factorize(pd.Series(self.titles, dtype=object))[0].astype(np.int64)


def clean(raw: RawData, on_empty_title: str = DataSettings.on_empty_title) -> tuple[RawData, int]:
    """Check what was read and drop repeated interactions, keeping the last of each user and item.

    Args:
        raw: From a reader.
        on_empty_title: ``"error"``, or ``"item_id"`` to call such items ``item <id>``.

    Returns:
        The same with unique interactions, and how many were dropped.

    Raises:
        DataError: Listing everything that is wrong, with counts and the first offending line.
    """
    items = raw.items.copy()
    empty = items["title"].fillna("").str.strip() == ""
    if on_empty_title == "item_id":
        items.loc[empty, "title"] = "item " + items.loc[empty, "item_id"]
        empty &= False
    problems = [
        _problem(len(raw.interactions) == 0, "there are no interactions"),
        _first(empty, "items have an empty title (allow it by data.on_empty_title=item_id)", raw.where_item),
        _first(items["item_id"].duplicated(), "item ids occur twice", raw.where_item),
        _first(
            ~raw.interactions["item_id"].isin(items["item_id"]),
            "interactions are with an item that is not in the catalogue",
            raw.where_interaction,
        ),
        _first(~np.isfinite(raw.interactions["timestamp"]), "timestamps are not finite numbers", raw.where_interaction),
    ]
    outside = ~raw.interactions["user_id"].isin(raw.users["user_id"])
    problems.append(_first(outside, "interactions are of a user who is not in the user file", raw.where_interaction))
    found = [problem for problem in problems if problem]
    if found:
        raise DataError("the data cannot be used: " + "; ".join(found))
    ordered = raw.interactions.sort_values("timestamp", kind="stable")
    kept = ordered.drop_duplicates(["user_id", "item_id"], keep="last").sort_index()
    return RawData(kept, items, raw.users, raw.where_interaction, raw.where_item), len(ordered) - len(kept)


def _with_key(name: str, values: pd.Series) -> pd.Series:
    """``name: value`` and a space, and nothing where there is no value."""
    text = values.fillna("").astype(str).str.strip()
    return (f"{name}: " + text + " ").where(text != "", "")


def _problem(wrong: bool, what: str) -> str:
    return what if wrong else ""


def _first(wrong: pd.Series, what: str, locate: Locate) -> str:
    count = int(wrong.sum())
    return f"{count} {what}, the first at {locate(int(np.flatnonzero(wrong)[0]))}" if count else ""
