"""Raw interactions and the item catalogue."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from fellrec.data.ragged import IntArray
from fellrec.errors import ConfigError, DataError, unknown

Locate = Callable[[int], str]
"""Row of a frame → ``file:line``, for error messages."""

ITEMS = "items.parquet"
"""The file of the items in the directory of prepared data."""
NO_VALUE = ("", "nan", "null", "none", "na", "n/a", "nat", "<na>", "\\n")
"""How missing values are written by pandas, databases and other programs, in small letters."""
TEXT_STYLES = ("plain", "key_value")
_OPTIONAL = ("genre",)
"""Fields of the default that many data sets do not have."""
MAX_TEXT = 100_000
"""Longest text of an item in characters, all of its fields together."""


@dataclass(frozen=True)
class RawData:
    """Output of a reader, not yet validated.

    Attributes:
        interactions: Columns ``user_id`` and ``item_id`` (text) and ``timestamp`` (float, NaN without one), in file
            order. Optional columns: ``rating`` (float), and ``stage`` (int, 0, 1 or 2 for training, validation and
            test) for data that are split already.
        items: Columns ``item_id`` and ``title`` (text) and any attributes (text).
        users: Column ``user_id`` (text) and any attributes.
        where_interaction: Row of ``interactions`` → ``file:line``.
        where_item: Row of ``items`` → ``file:line``.
        where_user: Row of ``users`` → ``file:line``.
        rating_name: What the data set calls the column ``rating``.
        no_items: Why there is no item file, for error messages.
        no_times: Why there are no timestamps, for error messages.
        no_split: Why the data are not split, for error messages.
        notes: What a user should know of the files, one sentence each.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame
    where_interaction: Locate = field(default=lambda row: f"interaction {row}")
    where_item: Locate = field(default=lambda row: f"item {row}")
    where_user: Locate = field(default=lambda row: f"user {row}")
    rating_name: str = "rating"
    no_items: str = ""
    no_times: str = ""
    no_split: str = ""
    notes: Sequence[str] = ()


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

    @classmethod
    def read(cls, path: Path) -> Catalogue:
        """From a Parquet file with columns ``item_id``, ``title`` and those of the attributes."""
        items = pd.read_parquet(path)
        return cls(tuple(items["item_id"]), tuple(items["title"]), items.drop(columns=["item_id", "title"]))

    def __len__(self) -> int:
        return len(self.item_ids)

    def texts(self, fields: Sequence[str] = ("title", "genre"), style: str = "plain") -> list[str]:
        """Join each item's fields (``item_id``, ``title``, attributes) with spaces.

        The field ``genre`` is skipped if the data set does not have it, unless it is the only one.

        Args:
            fields: Names of the fields, in output order.
            style: ``"plain"`` writes values only; ``"key_value"`` writes ``title: Heat genre: Crime``, as RecFormer
                does (Li et al. 2023, section 2.1), and skips missing values.

        Raises:
            ConfigError: If the data set does not have one of the fields, or the style is unknown.
            DataError: If a text is longer than `MAX_TEXT`.
        """
        if style not in TEXT_STYLES:
            raise ConfigError(unknown("objective.text", style, TEXT_STYLES))
        own = {"item_id": pd.Series(self.item_ids, dtype=object), "title": pd.Series(self.titles, dtype=object)}
        columns = {**own, **dict(self.attributes.items())}
        present = {name: columns[name] for name in fields if name in columns}
        absent = [name for name in fields if name not in columns and (name not in _OPTIONAL or not present)]
        if absent or not present:
            raise ConfigError(unknown("item field", ", ".join(absent), columns))
        if style == "key_value":
            written = [_with_key(name, column) for name, column in present.items()]
            return self._checked(written[0].str.cat(written[1:]).str.strip().tolist(), fields)
        first, *others = present.values()
        joined = first.fillna("").astype(str)
        for column in others:
            joined = joined.str.cat(column.fillna("").astype(str), sep=" ")
        return self._checked(joined.str.strip().tolist(), fields)

    def _checked(self, texts: list[str], fields: Sequence[str]) -> list[str]:
        longest = max(range(len(texts)), key=lambda item: len(texts[item]), default=0)
        if texts and len(texts[longest]) > MAX_TEXT:
            raise DataError(
                f"item {self.item_ids[longest]!r} has a text of {len(texts[longest]):,} characters in "
                f"{', '.join(fields)}; at most {MAX_TEXT:,} are allowed"
            )
        return texts

    @cached_property
    def title_groups(self) -> IntArray:
        """``[I]`` int64 title index; equal for items with the same title."""
        return pd.factorize(pd.Series(self.titles, dtype=object))[0].astype(np.int64)


def _with_key(name: str, values: pd.Series) -> pd.Series:
    """Format as ``name: value`` and a space; empty where the value is missing."""
    text = values.fillna("").astype(str).str.strip()
    return (f"{name}: " + text + " ").where(text != "", "")
