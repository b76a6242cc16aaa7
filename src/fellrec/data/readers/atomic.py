"""RecBole's atomic files, the generic format: ``NAME.inter`` and, if present, ``NAME.item`` and ``NAME.user``.

Data that are split already have ``NAME.train.inter``, ``NAME.valid.inter`` and ``NAME.test.inter`` instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fellrec.data.files import STAGES, atomic_names
from fellrec.data.readers.folder import existing_files, found_instead, hash_files
from fellrec.data.readers.ratings import about_words, some_of, to_ratings
from fellrec.data.readers.table import (
    lacking,
    lines_of,
    read_table,
    require_columns,
    require_distinct,
    require_separated,
    to_times,
)
from fellrec.data.schema import Locate, RawData
from fellrec.data.settings import AtomicSettings
from fellrec.errors import DataError, shorten, unknown

TITLES = ("title", "movie_title", "item_name", "name")
RATINGS = ("rating", "label")
_LIKE_A_STAGE = re.compile(r"(^|.*[._-])(train|training|valid|validation|val|dev|eval|test|testing)", re.IGNORECASE)
"""Names of files that are parts of a split, but not called as RecBole calls them."""
_LABELS, _NEGATIVE = {"0", "1", "-1", "0.0", "1.0", "-1.0", "true", "false"}, ("0", "-1", "0.0", "-1.0", "false")


@dataclass(frozen=True)
class _Files:
    """The files of a data set; ``interactions`` has one file, or one for each stage; ``ignored`` those beside it."""

    interactions: Sequence[Path]
    items: Path
    users: Path
    ignored: Sequence[Path] = ()

    @property
    def is_split(self) -> bool:
        """Whether each stage has a file of its own."""
        return len(self.interactions) > 1


@dataclass(frozen=True)
class _Interactions:
    """The interactions as in `RawData`, with their places, and the name of the rating's column if there is one.

    ``notes`` say which columns are not used though they look like ratings or labels.
    """

    table: pd.DataFrame
    locate: Locate
    rating_name: str | None
    no_times: str
    notes: Sequence[str]


class AtomicReader(AtomicSettings):
    """Tab-separated UTF-8 files whose header has name and type of each column, such as ``user_id:token``.

    Without an item file all items are without a title, see ``data.on_empty_title``.
    """

    def read(self) -> RawData:
        """Read the files.

        Raises:
            DataError: If a file or column is missing or a line is malformed.
        """
        files = self._files()
        found = self._interactions(files)
        users = _columns(files.users) if files.users.exists() else found.table[["user_id"]].drop_duplicates()
        require_columns(users, ("user_id",), files.users)
        return RawData(
            found.table,
            self._items(files.items),
            users.reset_index(drop=True),
            where_interaction=found.locate,
            where_item=lines_of(files.items, 2),
            where_user=lines_of(files.users, 2),
            rating_name=found.rating_name or "rating",
            no_items="" if files.items.exists() else f"{files.items} does not exist",
            no_times=found.no_times,
            no_split=f"{_listed(files.ignored)} are ignored because {files.interactions[0].name} is beside them"
            if files.ignored
            else "",
            notes=(*_about_ignored(files), *found.notes),
        )

    def fingerprint(self) -> str:
        """Hash of the files' contents."""
        files = self._files()
        paths = [*files.interactions, files.items, files.users]
        beside = f"|{_listed(files.ignored)}" if files.ignored else ""
        return f"{hash_files(paths)}|{self.title_column}|{self.rating_column}{beside}"

    def check(self) -> None:
        """Raise a ``DataError`` unless the files exist."""
        self._files()

    def _files(self) -> _Files:
        existing_files(self.root, ())
        folder = Path(self.root).expanduser()
        names = atomic_names(folder)
        if not names:
            raise DataError(f"data.root={self.root} has no .inter file{found_instead(self.root, ())}")
        name = self._choose(folder, names)
        whole, parts = folder / f"{name}.inter", [folder / f"{name}.{stage}.inter" for stage in STAGES]
        present = [path for path in parts if path.exists()]
        if not whole.exists() and not present:
            raise DataError(unknown("data.reader.name", name, names))
        found = [whole] if whole.exists() else existing_files(self.root, [path.name for path in parts])
        ignored = present if whole.exists() else ()
        return _Files(found, folder / f"{name}.item", folder / f"{name}.user", ignored)

    def _choose(self, folder: Path, names: Sequence[str]) -> str:
        if self.name is not None:
            return self.name
        if len(names) == 1:
            return names[0]
        parts = [f"{name}.inter" for name in names if _LIKE_A_STAGE.fullmatch(name)]
        if parts:
            raise DataError(
                f"{folder} has {shorten(', '.join(parts))}: the parts of a split must be called "
                f"{', '.join(f'NAME.{stage}.inter' for stage in STAGES)}; rename them"
            )
        raise DataError(
            f"{folder} has the .inter files of {shorten(', '.join(names))}; select one with data.reader.name"
        )

    def _interactions(self, files: _Files) -> _Interactions:
        tables = [_columns(path) for path in files.interactions]
        rating = () if self.rating_column is None else (self.rating_column,)
        for table, path in zip(tables, files.interactions, strict=True):
            require_columns(table, ("user_id", "item_id", *rating), path)
        joined = pd.concat(tables, ignore_index=True)
        bounds = np.cumsum([0, *map(len, tables)])

        def locate(row: int) -> str:
            """File and line of a row, for messages."""
            part = int(np.searchsorted(bounds, row, side="right")) - 1
            return f"{files.interactions[part]}:{row - bounds[part] + 2}"

        kept = joined[["user_id", "item_id"]].copy()
        no_times = lacking(joined, ("timestamp",), files.interactions[0])
        kept["timestamp"] = np.nan if no_times else to_times(joined["timestamp"].fillna(""), locate)
        rating_name = next((name for name in rating or RATINGS if name in joined.columns), None)
        if rating_name is not None:
            kept["rating"] = to_ratings(joined[rating_name])
        if files.is_split:
            kept["stage"] = np.repeat(np.arange(len(tables)), np.diff(bounds))
        return _Interactions(kept, locate, rating_name, no_times, tuple(_about_unused(joined, rating_name)))

    def _items(self, path: Path) -> pd.DataFrame:
        if not path.exists():
            return pd.DataFrame({"item_id": [], "title": []}, dtype=str)
        items = _columns(path)
        require_columns(items, ("item_id",), path)
        title = self._title(items, path)
        if title == "item_id":
            return items.assign(title=items["item_id"])
        if title != "title":
            items = items.drop(columns="title", errors="ignore").rename(columns={title: "title"})
        return items if "genre" in items.columns else items.rename(columns={"genres": "genre"})

    def _title(self, items: pd.DataFrame, path: Path) -> str:
        wanted = (self.title_column,) if self.title_column else TITLES
        for name in wanted:
            if name in items.columns:
                return name
        raise DataError(f"{path} has no title: {unknown('column', ' or '.join(wanted), items.columns)}")


def _about_unused(table: pd.DataFrame, rating_name: str | None) -> Iterator[str]:
    """What to know of columns with labels that are not looked at, and of ratings that are not numbers."""
    for name in table.columns:
        if name == rating_name:
            yield from about_words(table[name])
        elif name not in ("user_id", "item_id", "timestamp") and _has_labels(table[name]):
            is_negative = table[name].fillna("").str.strip().str.lower().isin(_NEGATIVE)
            if is_negative.any():
                yield (
                    f"the column {name} is not used: {some_of(is_negative)} interactions have "
                    f"{table[name][is_negative].iloc[0]} there and count like the others; data.reader.rating_column="
                    f"{name} with data.min_rating=1 leaves them out"
                )


def _has_labels(column: pd.Series) -> bool:
    return {str(value).strip().lower() for value in column.dropna().unique()} <= _LABELS


def _about_ignored(files: _Files) -> Iterator[str]:
    if files.ignored:
        yield f"{files.interactions[0].name} is read, and {_listed(files.ignored)} are ignored"


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths)


def _columns(path: Path) -> pd.DataFrame:
    table = read_table(path, "\t")
    header = [str(name) for name in table.columns]
    require_separated(header, path, "\t")
    names = [name.partition(":")[0].strip() for name in header]
    require_distinct(names, path)
    return table.set_axis(names, axis=1)
