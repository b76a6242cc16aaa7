"""Raw interactions and the item catalogue, and the validation of raw data."""

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
"""Row of a frame → ``file:line``, for error messages."""

TEXT_STYLES = ("plain", "key_value")


@dataclass(frozen=True)
class RawData:
    """Output of a reader, not yet validated.

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
    """Interface of ``data.reader``."""

    def read(self) -> RawData:
        """Read the whole data set."""

    def fingerprint(self) -> str:
        """Hash of the files and settings that ``read`` depends on."""


@dataclass(frozen=True)
class Catalogue:
    """The items; item ``i`` is entry ``i`` of all fields.

    Attributes:
        item_ids: Item ids of the data set.
        titles: One title per item, not necessarily unique.
        attributes: One row per item; text columns such as ``genre``.
    """

    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    attributes: pd.DataFrame

    def __len__(self) -> int:
        return len(self.item_ids)

    def texts(self, fields: Sequence[str] = ("title", "genre"), style: str = "plain") -> list[str]:
        """Join each item's fields (``item_id``, ``title``, attributes) with spaces; absent fields are skipped.

        Args:
            fields: Names of the fields, in output order.
            style: ``"plain"`` writes values only; ``"key_value"`` writes ``title: Heat genre: Crime``, as RecFormer
                does (Li et al. 2023, section 2.1), and skips missing values.

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
        """``[I]`` int64 title index; equal for items with the same title."""
        return pd.factorize(pd.Series(self.titles, dtype=object))[0].astype(np.int64)


def clean(raw: RawData, on_empty_title: str = DataSettings.on_empty_title) -> tuple[RawData, int]:
    """Validate raw data and drop repeated interactions, keeping the last one of each user and item.

    Args:
        raw: Output of a reader.
        on_empty_title: ``"error"``, or ``"item_id"`` to use ``item <id>`` as the title of such items.

    Returns:
        The data with unique interactions, and the number of dropped interactions.

    Raises:
        DataError: If the data are invalid; lists all problems with counts and the first offending line.
    """
    items = raw.items.copy()
    empty = items["title"].fillna("").str.strip() == ""
    if on_empty_title == "item_id":
        items.loc[empty, "title"] = "item " + items.loc[empty, "item_id"]
        empty &= False
    problems = [
        "the interactions are empty" if raw.interactions.empty else "",
        _first(empty, "items have an empty title (set data.on_empty_title=item_id to allow it)", raw.where_item),
        _first(items["item_id"].duplicated(), "item ids are duplicates", raw.where_item),
        _first(
            ~raw.interactions["item_id"].isin(items["item_id"]),
            "interactions have an item that is not in the catalogue",
            raw.where_interaction,
        ),
        _first(~np.isfinite(raw.interactions["timestamp"]), "timestamps are not finite numbers", raw.where_interaction),
        _first(
            ~raw.interactions["user_id"].isin(raw.users["user_id"]),
            "interactions have a user that is not in the user file",
            raw.where_interaction,
        ),
    ]
    found = [problem for problem in problems if problem]
    if found:
        raise DataError("invalid data: " + "; ".join(found))
    ordered = raw.interactions.sort_values("timestamp", kind="stable")
    kept = ordered.drop_duplicates(["user_id", "item_id"], keep="last").sort_index()
    return RawData(kept, items, raw.users, raw.where_interaction, raw.where_item), len(ordered) - len(kept)


def _with_key(name: str, values: pd.Series) -> pd.Series:
    """Format as ``name: value`` and a space; empty where the value is missing."""
    text = values.fillna("").astype(str).str.strip()
    return (f"{name}: " + text + " ").where(text != "", "")


def _first(wrong: pd.Series, what: str, locate: Locate) -> str:
    count = int(wrong.sum())
    return f"{count} {what}, first at {locate(int(np.flatnonzero(wrong)[0]))}" if count else ""
