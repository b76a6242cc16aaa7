"""Amazon's reviews as published: 2018 (Ni, Li, McAuley 2019) and 2023 (Hou et al. 2024)."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from fellrec.data.files import GZIP, META, amazon_file, format_of, stem
from fellrec.data.readers.folder import existing_files, hash_files
from fellrec.data.readers.own import first_of_each_item
from fellrec.data.readers.ratings import some_of, to_ratings
from fellrec.data.readers.records import Layout, names_of, read_records
from fellrec.data.readers.table import to_times
from fellrec.data.schema import Locate, RawData
from fellrec.data.table_settings import AmazonSettings
from fellrec.errors import DataError, shorten

_MEANINGS = ("user_id", "item_id", "rating", "timestamp")
_CORE = "_5"
"""How the names of the 5-core files of 2018 end; their metadata are those of the whole category."""
_PROGRAM = "getTime"
"""In titles of 2018 that are a piece of the shop's program; its authors advise to leave them out."""


@dataclass(frozen=True)
class _Published:
    """What a version calls the things.

    Attributes:
        reviews: Columns with user, item, rating and time.
        header: Columns of the file of ratings, if it has no header.
        item: Column of the metadata with the item.
        genre: Its columns with categories; the first that is not empty is used.
        others: Its columns that are kept under their own names.
    """

    reviews: Sequence[str]
    header: Sequence[str] | None
    item: str
    genre: Sequence[str]
    others: Sequence[str]


_VERSIONS: Mapping[int, _Published] = {
    2018: _Published(
        reviews=("reviewerID", "asin", "overall", "unixReviewTime"),
        header=("asin", "reviewerID", "overall", "unixReviewTime"),
        item="asin",
        genre=("category", "main_cat"),
        others=("brand",),
    ),
    2023: _Published(
        reviews=("user_id", "parent_asin", "rating", "timestamp"),
        header=None,
        item="parent_asin",
        genre=("categories", "main_category"),
        others=("store",),
    ),
}


class AmazonReader(AmazonSettings):
    """One category: reviews (JSON lines) or ratings (CSV), and ``meta_CATEGORY``; all may be compressed.

    Every review is an interaction. Times are as published: seconds in 2018, milliseconds in 2023. Items that the
    metadata list more than once have the values of their first line. The ratings of 2018 have no header: item, user,
    rating, time.
    """

    def check(self) -> None:
        """Raise a ``DataError`` unless the files exist and have the columns."""
        reviews, metadata = self._paths()
        self._check_columns(reviews, self._published.reviews)
        if metadata is not None:
            self._check_columns(metadata, (self._published.item, "title"))

    def read(self) -> RawData:
        """Read the files.

        Raises:
            DataError: If a file or column is missing, or a line is malformed.
        """
        self.check()
        path, metadata = self._paths()
        names = self._published.reviews
        table, locate = read_records(path, self._layout(path), names)
        interactions = table[list(names)].set_axis(list(_MEANINGS), axis=1)
        interactions["rating"] = to_ratings(interactions["rating"])
        interactions["timestamp"] = to_times(interactions["timestamp"], locate)
        users = interactions[["user_id"]].drop_duplicates().reset_index(drop=True)
        notes: list[str] = []
        if metadata is None:
            items, where = pd.DataFrame({"item_id": [], "title": []}, dtype=str), locate
        else:
            items, where = self._items(metadata, notes)
        return RawData(
            interactions,
            items,
            users,
            where_interaction=locate,
            where_item=where,
            no_items="data.reader.metadata=none" if metadata is None else "",
            no_split=f"{path} is one file",
            notes=tuple(notes),
        )

    def fingerprint(self) -> str:
        """Hash of the files' contents and of the settings."""
        return f"{hash_files([path for path in self._paths() if path is not None])}|{self.version}"

    @property
    def _published(self) -> _Published:
        return _VERSIONS[self.version]

    def _paths(self) -> tuple[Path, Path | None]:
        existing_files(self.root, ())
        reviews = amazon_file(self.root, self.name)
        if self.metadata == "none":
            return reviews, None
        names = dict.fromkeys([stem(reviews), stem(reviews).removesuffix(_CORE)])
        endings = [f"{ending}{packed}" for ending in (".jsonl", ".json") for packed in ("", GZIP)]
        candidates = [reviews.parent / f"{META}{name}{ending}" for name in names for ending in endings]
        found = [path for path in candidates if path.is_file()]
        if not found:
            raise DataError(
                f"data.root={self.root} lacks the titles of {reviews.name}: {META}{list(names)[-1]}.jsonl or .json, "
                f"also with {GZIP}; data.reader.metadata=none does without titles"
            )
        return reviews, found[0]

    def _layout(self, path: Path) -> Layout:
        kind = format_of(path, "auto", "data.reader.name")
        return Layout(kind, ",", self._published.header if kind == "csv" else None)

    def _check_columns(self, path: Path, wanted: Sequence[str]) -> None:
        names = names_of(path, self._layout(path))
        if missing := [name for name in wanted if name not in names]:
            others = [year for year, other in _VERSIONS.items() if {*other.reviews} <= {*names}]
            hint = f": data=amazon_{others[0]} reads it" if others else ""
            raise DataError(f"{path} lacks {', '.join(missing)}; it has {shorten(', '.join(names))}{hint}")

    def _items(self, path: Path, notes: list[str]) -> tuple[pd.DataFrame, Locate]:
        published = self._published
        layout = self._layout(path)
        present = [name for name in (*published.genre, *published.others) if name in names_of(path, layout)]
        table, locate = read_records(path, layout, [published.item, "title", *present])
        table = table.apply(lambda column: column.map(html.unescape))
        items = table[[published.item, "title"]].set_axis(["item_id", "title"], axis=1)
        genre = pd.Series("", index=items.index, dtype=str)
        for name in reversed([name for name in published.genre if name in present]):
            genre = table[name].where(table[name].str.strip() != "", genre)
        items = items.assign(genre=genre, **{name: table[name] for name in published.others if name in present})
        is_program = items["title"].str.contains(_PROGRAM, regex=False)
        if is_program.any():
            notes.append(f"{some_of(is_program)} items have a title that is a piece of a program: it counts as empty")
            items["title"] = items["title"].mask(is_program, "")
        kept, again = first_of_each_item(items)
        if again:
            notes.append(f"{len(again):,} items are listed again with other values: the first of each is kept")
        rows = kept.index.to_numpy()
        return kept, lambda row: locate(int(rows[row]))
