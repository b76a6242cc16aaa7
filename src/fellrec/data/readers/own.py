"""Data of one's own: a table of interactions, and the items in the same table or in another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from fellrec.data.files import format_of
from fellrec.data.readers.columns import USUAL, find_column, need_column
from fellrec.data.readers.folder import hash_files
from fellrec.data.readers.ratings import about_words, to_ratings
from fellrec.data.readers.records import Layout, names_of, read_records
from fellrec.data.readers.table import require_distinct, to_times
from fellrec.data.schema import Locate, RawData
from fellrec.data.table_settings import TableSettings
from fellrec.errors import DataError, shorten
from fellrec.state.nearest import similar

_ID = {"item": "item_id", "user": "user_id"}


@dataclass(frozen=True)
class _Table:
    """A file whose columns are known.

    Attributes:
        path: The file.
        layout: How it is written.
        columns: Meaning → its column; those that describe an item or user have their own names.
    """

    path: Path
    layout: Layout
    columns: Mapping[str, str]

    def read(self) -> tuple[pd.DataFrame, Locate]:
        """The columns under their meanings, all text, and the place of each row."""
        table, locate = read_records(self.path, self.layout, list(dict.fromkeys(self.columns.values())))
        return pd.DataFrame({meaning: table[name] for meaning, name in self.columns.items()}), locate


@dataclass(frozen=True)
class _Tables:
    interactions: _Table
    items: _Table | None
    users: _Table | None


class TableReader:
    """CSV, TSV, JSON lines or Parquet; see `TableSettings`.

    A value that is a list is its values with spaces between them; so is a genre with bars, ``Drama|Comedy``.
    """

    def __init__(self, settings: TableSettings) -> None:
        self.settings = settings

    def check(self) -> None:
        """Raise a ``DataError`` unless the files exist and have the columns."""
        self._tables()

    def read(self) -> RawData:
        """Read the files.

        Raises:
            DataError: If a file or column is missing, or a line is malformed.
            ConfigError: If a setting does not fit the data.
        """
        tables = self._tables()
        table, locate = tables.interactions.read()
        interactions = table[["user", "item"]].rename(columns=_ID)
        interactions["timestamp"] = self._times(tables.interactions, table, locate)
        notes = [self._about_columns(tables.interactions)]
        if "rating" in table:
            interactions["rating"] = to_ratings(table["rating"])
            notes += about_words(table["rating"].rename(tables.interactions.columns["rating"]))
        own = self._of_same_file(table, locate, "user", self.settings.columns.of_user)
        users, where_user = own if tables.users is None else self._of_file(tables.users, "user")
        items, where_item, no_items = self._items(tables, table, locate, notes)
        return RawData(
            interactions,
            items,
            users,
            where_interaction=locate,
            where_item=where_item,
            where_user=where_user,
            rating_name=tables.interactions.columns.get("rating", "rating"),
            no_items=no_items,
            no_times="" if "time" in table else _lacks(tables.interactions.path, "time"),
            no_split=f"{tables.interactions.path} is one file",
            notes=tuple(filter(None, notes)),
        )

    def fingerprint(self) -> str:
        """Hash of the files' contents and of all settings but the folders of the files."""
        tables = self._tables()
        given = [table for table in (tables.interactions, tables.items, tables.users) if table is not None]
        settings = replace(self.settings, path="-", items=None, users=None)
        return f"{hash_files([table.path for table in given])}|{settings}"

    def _tables(self) -> _Tables:
        settings, columns = self.settings, self.settings.columns
        interactions = self._of_interactions()
        items = users = None
        if settings.items is not None:
            given, key = (columns.item, "data.columns.item")
            if columns.item_of_items is not None:
                given, key = columns.item_of_items, "data.columns.item_of_items"
            items = self._describing(settings.items, "items", "item", given, key)
        if settings.users is not None:
            given, key = (columns.user, "data.columns.user")
            if columns.user_of_users is not None:
                given, key = columns.user_of_users, "data.columns.user_of_users"
            users = self._describing(settings.users, "users", "user", given, key)
        return _Tables(interactions, items, users)

    def _of_interactions(self) -> _Table:
        given = self.settings.columns
        path = _existing(self.settings.path, "data.path")
        layout = self._layout(path, "data.path", self.settings.header)
        names = _distinct_names(path, layout)
        columns = {meaning: need_column(meaning, getattr(given, meaning), names, path) for meaning in ("user", "item")}
        optional = ["time", "rating"] if self.settings.items is not None else ["time", "rating", "title", "genre"]
        for meaning in optional:
            if found := find_column(meaning, getattr(given, meaning), names, path):
                columns[meaning] = found
        for setting in ("of_item", "of_user"):
            for name in getattr(given, setting):
                columns[f"{setting}.{name}"] = str(find_column("item", name, names, path, f"data.columns.{setting}"))
        return _Table(path, layout, columns)

    def _describing(self, file: str, setting: str, kind: str, given: str | None, key: str) -> _Table:
        """The table of items or users: its id, and all other columns."""
        path = _existing(file, f"data.{setting}")
        layout = self._layout(path, f"data.{setting}", None)
        names = _distinct_names(path, layout)
        columns = {kind: need_column(kind, given, names, path, key if given else f"data.columns.{kind}_of_{setting}")}
        if kind == "item":
            for meaning in ("title", "genre"):
                if found := find_column(meaning, getattr(self.settings.columns, meaning), names, path):
                    columns[meaning] = found
        known = {*columns.values(), "title", "genre", _ID[kind]}
        return _Table(path, layout, {**columns, **{f"of_{kind}.{n}": n for n in names if n not in known}})

    def _layout(self, path: Path, setting: str, header: Sequence[str] | None) -> Layout:
        return Layout(format_of(path, self.settings.format, setting), self.settings.separator, header)

    def _times(self, source: _Table, table: pd.DataFrame, locate: Locate) -> pd.Series | float:
        if "time" not in table:
            return np.nan
        times = table["time"].rename(source.columns["time"])
        try:
            return to_times(times, locate, self.settings.time_format)
        except DataError as error:
            raise DataError(f"{error}; data.reader.time_format=%d.%m.%Y reads dates such as 31.12.2024") from error

    def _items(
        self, tables: _Tables, table: pd.DataFrame, locate: Locate, notes: list[str]
    ) -> tuple[pd.DataFrame, Locate, str]:
        """The items, their places, and why none have titles."""
        source = tables.items or tables.interactions
        no_titles = _lacks(source.path, "title")
        if tables.items is None and "title" not in table:
            empty = pd.DataFrame({"item_id": [], "title": []}, dtype=str)
            return empty, locate, f"data.items is not given, and {no_titles}"
        if tables.items is not None:
            items, where = self._of_file(tables.items, "item")
            if "title" not in items:
                raise DataError(no_titles)
            items, where = self._distinct_items(items, where, notes)
        else:
            own = self.settings.columns.of_item
            items, where = self._of_same_file(table, locate, "item", own, ("title", "genre"))
            notes.append(_about_titles(table))
        if "genre" in items:
            items["genre"] = items["genre"].str.replace("|", " ", regex=False)
        return items, where, ""

    def _of_file(self, source: _Table, kind: str) -> tuple[pd.DataFrame, Locate]:
        table, locate = source.read()
        names = {name: name.removeprefix(f"of_{kind}.") for name in table.columns}
        return table.rename(columns={**names, kind: _ID[kind]}), locate

    def _of_same_file(
        self,
        table: pd.DataFrame,
        locate: Locate,
        kind: str,
        own: Sequence[str],
        shared: Sequence[str] = (),
    ) -> tuple[pd.DataFrame, Locate]:
        """What the interactions say of each item or user: in each column the first value that is not empty."""
        columns = {name: name for name in shared if name in table} | {f"of_{kind}.{name}": name for name in own}
        first = table[kind].drop_duplicates()
        found = pd.DataFrame({_ID[kind]: first.to_numpy()}, dtype=str)
        for column, name in columns.items():
            filled = table[[kind, column]][table[column].str.strip() != ""].drop_duplicates(kind)
            found[name] = first.map(filled.set_index(kind)[column]).fillna("").astype(str).to_numpy()
        rows = first.index.to_numpy()
        return found, lambda row: locate(int(rows[row]))

    def _distinct_items(self, items: pd.DataFrame, where: Locate, notes: list[str]) -> tuple[pd.DataFrame, Locate]:
        """The items without those that are listed again with other values."""
        kept, found = first_of_each_item(items)
        if not found:
            return items, where
        item = shorten(repr(items["item_id"][found[0]]), 80)
        text = f"{len(found):,} items are listed again with other values (item {item})"
        if self.settings.duplicate_items == "error":
            raise DataError(
                f"{text}, first at {where(found[0])}; data.reader.duplicate_items=first keeps the first of each"
            )
        notes.append(f"{text}: the first of each is kept")
        rows = kept.index.to_numpy()
        return kept, lambda row: where(int(rows[row]))

    def _about_columns(self, table: _Table) -> str:
        """Which columns were chosen by their names, unless these are the first that are tried."""
        chosen = {
            meaning: name
            for meaning, name in table.columns.items()
            if meaning in USUAL and getattr(self.settings.columns, meaning) is None
        }
        texts = [f"{meaning} is {name}" for meaning, name in chosen.items()]
        is_plain = all(name == USUAL[meaning][0] for meaning, name in chosen.items())
        return "" if is_plain else f"columns of {table.path.name} by their names: {', '.join(texts)} (see data.columns)"


def first_of_each_item(items: pd.DataFrame) -> tuple[pd.DataFrame, list[int]]:
    """The first row of each item, and the rows of items that are listed again with other values."""
    different = items[~items.duplicated()]
    again = different["item_id"].duplicated()
    return items[~items["item_id"].duplicated()], [int(row) for row in different.index[again]]


def _existing(given: str, setting: str) -> Path:
    path = Path(given).expanduser()
    if path.is_dir():
        raise DataError(f"{setting}={given} is a directory; give the file")
    if not path.is_file():
        raise DataError(f"{setting}={given} does not exist{similar(path)}")
    return path


def _lacks(path: Path, meaning: str) -> str:
    return f"{path} has no column {', '.join(USUAL[meaning])}, and data.columns.{meaning} is not given"


def _distinct_names(path: Path, layout: Layout) -> list[str]:
    names = names_of(path, layout)
    if not names:
        raise DataError(f"{path} is empty")
    require_distinct(names, path)
    return names


def _about_titles(table: pd.DataFrame) -> str:
    """That items have several titles."""
    pairs = table[table["title"].str.strip() != ""][["item", "title"]].drop_duplicates()
    several = pairs["item"].duplicated()
    if not several.any():
        return ""
    item = pairs["item"][several].iloc[0]
    first, second = pairs["title"][pairs["item"] == item].iloc[:2]
    return (
        f"{pairs['item'][several].nunique():,} items have several titles, such as {shorten(repr(item), 40)}: "
        f"{shorten(repr(first), 60)} and {shorten(repr(second), 60)}; the first is used"
    )
