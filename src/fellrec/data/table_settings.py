"""Settings of data of one's own, in a table, and of Amazon's reviews."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fellrec.data.settings import DataSettings, Root
from fellrec.functional.ranges import Line, check, line, words

File = Annotated[str, line(text="the file with the interactions, given as data.path")]
Separator = Annotated[str, line(lambda text: len(text) == 1 and text != '"', "one character, such as ; or |")]
Columns = Annotated[Any, words("a list of different names of columns, such as [artist,album]", least=0)]
Header = Annotated[Any, words("a list of different names, one for each column, such as [user,item,rating,time]")]


@dataclass(frozen=True)
class ColumnSettings:
    """Which column of a table means what; null tries usual names in any spelling, such as ``userId`` or ``User ID``."""

    user: Line | None = None
    """Column with the user's id; null tries user_id, user, reviewer_id and customer_id."""
    item: Line | None = None
    """Column with the item's id; null tries item_id, item, movie_id, product_id, track_id, parent_asin and asin."""
    time: Line | None = None
    """Column with the time: numbers, or dates and times in ISO 8601; null tries timestamp, time, datetime, date,
    played_at and unix_review_time."""
    rating: Line | None = None
    """Column with the rating or label for ``data.min_rating``; null tries rating, stars, overall and label."""
    title: Line | None = None
    """Column with the item's title; null tries title, name, item_name, movie_title, product_name and track_name."""
    genre: Line | None = None
    """Column with the item's genre or category; null tries genre, genres, category and categories."""
    item_of_items: Line | None = None
    """Column of ``data.items`` with the item's id; null is as ``item``."""
    user_of_users: Line | None = None
    """Column of ``data.users`` with the user's id; null is as ``user``."""
    of_item: Columns = ()
    """Other columns of ``data.path`` that describe the item, such as [artist,album]; of ``data.items`` all are kept."""
    of_user: Columns = ()
    """Columns of ``data.path`` that describe the user, such as [country] for ``partition=attribute``; of ``data.users``
    all are kept."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "data.columns")


@dataclass(frozen=True)
class TableDataSettings(DataSettings):
    """Settings of the preparation of a table."""

    path: File = field(kw_only=True)
    """File with one interaction a line: .csv, .tsv, .jsonl or .parquet; those of text may be compressed, .csv.gz."""
    items: Line | None = field(default=None, kw_only=True)
    """File with one item a line: its id, title and anything else; null: titles are in ``path``."""
    users: Line | None = field(default=None, kw_only=True)
    """File with one user a line, for ``partition=attribute``; null: there is none."""
    columns: ColumnSettings = field(default_factory=ColumnSettings, kw_only=True)
    """Which column means what."""

    def __post_init__(self) -> None:
        """Check all ranges, and that no folder is given."""
        is_folder = self.root is not None
        problem = (
            f"data.root={self.root} is not allowed with data=table: give the file as data.path" if is_folder else None
        )
        check(self, "data", problem)


@dataclass(frozen=True)
class TableSettings:
    """A reader of tables: CSV, TSV, JSON lines and Parquet."""

    path: File
    """File with the interactions."""
    items: Line | None = None
    """File with the items; null: titles are in ``path``."""
    users: Line | None = None
    """File with the users; null: there is none."""
    columns: ColumnSettings = field(default_factory=ColumnSettings)
    """Which column means what."""
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet"] = "auto"
    """Format of all files; auto decides by the ending of each name."""
    separator: Separator | None = None
    """Between the columns of CSV files; null: a comma, or what else separates the header: semicolon, tab or bar."""
    header: Header | None = None
    """Names of the columns of ``path`` if it has no line with them; null: its first line has them."""
    time_format: Line | None = None
    """Of times that are not numbers or ISO 8601, such as %d.%m.%Y %H:%M, as for Python's strptime."""
    duplicate_items: Literal["error", "first"] = "error"
    """Items that ``items`` lists again with other values: error refuses them, first keeps the first."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "data.reader")


@dataclass(frozen=True)
class AmazonSettings:
    """A reader of Amazon's reviews as published: a file of reviews or ratings, and one of metadata."""

    root: Root
    """Folder of the files."""
    version: Literal[2018, 2023] = 2023
    """Year of the data set: 2018 (Ni et al.) or 2023 (Hou et al.)."""
    name: Line | None = None
    """File of reviews or ratings, with or without its ending, such as Video_Games or Video_Games_5; null takes the only
    one."""
    metadata: Literal["required", "none"] = "required"
    """The file with titles, meta_CATEGORY: required refuses to work without it, none does not read it."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "data.reader")
