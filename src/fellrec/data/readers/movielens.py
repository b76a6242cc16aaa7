"""MovieLens as published: 100K, 1M and 10M (latin-1 or UTF-8), 1M as atomic files, and the later csv form."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fellrec.data.readers.atomic import AtomicReader
from fellrec.data.readers.decoding import UTF8_OR_LATIN1
from fellrec.data.readers.folder import FILES, existing_files, hash_files
from fellrec.data.readers.table import lines_of, read_csv, read_table, require_columns, to_numbers, to_times
from fellrec.data.schema import Locate, RawData
from fellrec.data.settings import FilesSettings

_INTERACTIONS = ("user_id", "item_id", "rating", "timestamp")
_CSV_NAMES = ("userId", "movieId", "rating", "timestamp")
_NO_GENRE = "(no genres listed)"
_GENRES = (
    "unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy Film-Noir Horror Musical "
    "Mystery Romance Sci-Fi Thriller War Western"
).split()


class MovieLens100KReader(FilesSettings):
    """``u.data``, ``u.item`` and ``u.user``; every rating is an interaction."""

    def read(self) -> RawData:
        """Read the files.

        Raises:
            DataError: If a file is missing or a line is malformed.
        """
        data, item, user = self._paths()
        interactions = _interactions(data, "\t")
        items = read_table(
            item, "|", ("item_id", "title", "release_date", "video_date", "url", *_GENRES), encodings=UTF8_OR_LATIN1
        )
        flags = items[_GENRES].to_numpy(dtype=object) == "1"
        genre = [" ".join(name for name, flag in zip(_GENRES, row, strict=True) if flag) for row in flags]
        items = pd.DataFrame({"item_id": items["item_id"], "title": items["title"], "genre": genre})
        users = read_table(user, "|", ("user_id", "age", "gender", "occupation", "zip_code"), encodings=UTF8_OR_LATIN1)
        return RawData(interactions, items, users, lines_of(data, 1), lines_of(item, 1), lines_of(user, 1))

    def fingerprint(self) -> str:
        """Hash of the files' contents."""
        return hash_files(self._paths())

    def check(self) -> None:
        """Raise a ``DataError`` unless the files exist."""
        self._paths()

    def _paths(self) -> list[Path]:
        return existing_files(self.root, FILES["ml_100k"])


class MovieLens1MReader(FilesSettings):
    """``ratings.dat``, ``movies.dat`` and ``users.dat``, or RecBole's atomic files; every rating is an interaction.

    MovieLens-10M has no ``users.dat``; without it users have no attributes.
    """

    def read(self) -> RawData:
        """Read the published files or the atomic ones.

        Raises:
            DataError: If neither exists, or a line is malformed.
        """
        if self._is_atomic():
            return AtomicReader(self.root).read()
        ratings, movies, people = self._paths()
        items = read_table(movies, "::", ("item_id", "title", "genre"), encodings=UTF8_OR_LATIN1)
        items["genre"] = items["genre"].str.replace("|", " ", regex=False)
        interactions = _interactions(ratings, "::")
        users = interactions[["user_id"]].drop_duplicates().reset_index(drop=True)
        if people.exists():
            columns = ("user_id", "gender", "age", "occupation", "zip_code")
            users = read_table(people, "::", columns, encodings=UTF8_OR_LATIN1)
        return RawData(interactions, items, users, lines_of(ratings, 1), lines_of(movies, 1), lines_of(people, 1))

    def fingerprint(self) -> str:
        """Hash of the files' contents."""
        return AtomicReader(self.root).fingerprint() if self._is_atomic() else hash_files(self._paths())

    def _is_atomic(self) -> bool:
        folder = Path(self.root).expanduser()
        return not (folder / "ratings.dat").exists() and any(folder.glob("*.inter"))

    def check(self) -> None:
        """Raise a ``DataError`` unless the files exist."""
        AtomicReader(self.root).check() if self._is_atomic() else self._paths()

    def _paths(self) -> list[Path]:
        found = existing_files(self.root, FILES["ml_1m"], "RecBole's *.inter, *.item, *.user")
        return [*found, Path(self.root).expanduser() / "users.dat"]


class MovieLensCsvReader(FilesSettings):
    """``ratings.csv`` and ``movies.csv``, as ml-latest-small, 20M, 25M and 32M; every rating is an interaction."""

    def read(self) -> RawData:
        """Read the files.

        Raises:
            DataError: If a file or column is missing or a line is malformed.
        """
        ratings, movies = self._paths()
        interactions, where_interaction = read_csv(ratings)
        require_columns(interactions, tuple(_CSV_NAMES), ratings)
        interactions = interactions[list(_CSV_NAMES)].set_axis(list(_INTERACTIONS), axis=1)
        items, where_item = read_csv(movies)
        require_columns(items, ("movieId", "title", "genres"), movies)
        items = items[["movieId", "title", "genres"]].set_axis(["item_id", "title", "genre"], axis=1)
        genre = items["genre"].str.replace(_NO_GENRE, "", regex=False).str.replace("|", " ", regex=False)
        users = interactions[["user_id"]].drop_duplicates().reset_index(drop=True)
        return RawData(
            _numbers(interactions, where_interaction), items.assign(genre=genre), users, where_interaction, where_item
        )

    def fingerprint(self) -> str:
        """Hash of the files' contents."""
        return hash_files(self._paths())

    def check(self) -> None:
        """Raise a ``DataError`` unless the files exist."""
        self._paths()

    def _paths(self) -> list[Path]:
        return existing_files(self.root, FILES["ml_csv"])


def _interactions(path: Path, separator: str) -> pd.DataFrame:
    return _numbers(read_table(path, separator, _INTERACTIONS, encodings=UTF8_OR_LATIN1), lines_of(path, 1))


def _numbers(table: pd.DataFrame, locate: Locate) -> pd.DataFrame:
    return table.assign(rating=to_numbers(table["rating"], locate), timestamp=to_times(table["timestamp"], locate))
