"""RecBole's atomic files, the generic format: ``NAME.inter`` and, if present, ``NAME.item`` and ``NAME.user``.

Data that are split already have ``NAME.train.inter``, ``NAME.valid.inter`` and ``NAME.test.inter`` instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from fellrec.data.readers.table import (
    existing_files,
    hash_files,
    lacking,
    lines_of,
    read_table,
    require_columns,
    require_distinct,
    to_times,
)
from fellrec.data.schema import Locate, RawData
from fellrec.data.settings import AtomicSettings
from fellrec.errors import DataError, shorten, unknown

TITLES = ("title", "movie_title", "item_name", "name")
RATINGS = ("rating", "label")
STAGES = ("train", "valid", "test")
_SUFFIX = re.compile(rf"(\.({'|'.join(STAGES)}))?\.inter$")


@dataclass(frozen=True)
class _Files:
    """The files of a data set; ``interactions`` has one file, or one for each stage."""

    interactions: Sequence[Path]
    items: Path
    users: Path

    @property
    def is_split(self) -> bool:
        return len(self.interactions) > 1


@dataclass(frozen=True)
class _Interactions:
    """The interactions as in `RawData`, with their places, and the name of the rating's column if there is one."""

    table: pd.DataFrame
    locate: Locate
    rating_name: str | None
    no_times: str


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
        )

    def fingerprint(self) -> str:
        """Hash of the files' contents."""
        files = self._files()
        paths = [*files.interactions, files.items, files.users]
        return f"{hash_files(paths)}|{self.title_column}|{self.rating_column}"

    def _files(self) -> _Files:
        existing_files(self.root, ())
        folder = Path(self.root).expanduser()
        names = sorted({_SUFFIX.sub("", path.name) for path in folder.glob("*.inter")})
        if not names:
            raise DataError(f"{folder} has no .inter file")
        if self.name is None and len(names) > 1:
            raise DataError(f"{folder} has the .inter files of {', '.join(names)}; select one with data.reader.name")
        name = names[0] if self.name is None else self.name
        whole, parts = folder / f"{name}.inter", [folder / f"{name}.{stage}.inter" for stage in STAGES]
        if not any(path.exists() for path in (whole, *parts)):
            raise DataError(unknown("data.reader.name", name, names))
        found = [whole] if whole.exists() else existing_files(self.root, [path.name for path in parts])
        return _Files(found, folder / f"{name}.item", folder / f"{name}.user")

    def _interactions(self, files: _Files) -> _Interactions:
        tables = [_columns(path) for path in files.interactions]
        rating = () if self.rating_column is None else (self.rating_column,)
        for table, path in zip(tables, files.interactions, strict=True):
            require_columns(table, ("user_id", "item_id", *rating), path)
        joined = pd.concat(tables, ignore_index=True)
        bounds = np.cumsum([0, *map(len, tables)])

        def locate(row: int) -> str:
            part = int(np.searchsorted(bounds, row, side="right")) - 1
            return f"{files.interactions[part]}:{row - bounds[part] + 2}"

        kept = joined[["user_id", "item_id"]].copy()
        no_times = lacking(joined, ("timestamp",), files.interactions[0])
        kept["timestamp"] = np.nan if no_times else to_times(joined["timestamp"].fillna(""), locate)
        rating_name = next((name for name in rating or RATINGS if name in joined.columns), None)
        if rating_name is not None:
            kept["rating"] = pd.to_numeric(joined[rating_name], errors="coerce").astype(float)
        if files.is_split:
            kept["stage"] = np.repeat(np.arange(len(tables)), np.diff(bounds))
        return _Interactions(kept, locate, rating_name, no_times)

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


def _columns(path: Path) -> pd.DataFrame:
    table = read_table(path, "\t")
    header = [str(name) for name in table.columns]
    if len(header) == 1 and re.search(r"[,;|\s]", header[0]):
        raise DataError(f"{path}:1: columns must be separated by a tab; the header is {shorten(repr(header[0]))}")
    names = [name.partition(":")[0] for name in header]
    require_distinct(names, path)
    return table.set_axis(names, axis=1)
