"""MovieLens-100K and -1M as published (latin-1), and -1M as atomic files."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fellrec.data.readers.atomic import AtomicReader
from fellrec.data.readers.table import existing_files, hash_files, lines_of, read_table, to_numbers
from fellrec.data.schema import RawData
from fellrec.data.settings import FilesSettings

_INTERACTIONS = ("user_id", "item_id", "rating", "timestamp")
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
            item, "|", ("item_id", "title", "release_date", "video_date", "url", *_GENRES), encoding="latin-1"
        )
        flags = items[_GENRES].to_numpy(dtype=object) == "1"
        genre = [" ".join(name for name, flag in zip(_GENRES, row, strict=True) if flag) for row in flags]
        items = pd.DataFrame({"item_id": items["item_id"], "title": items["title"], "genre": genre})
        users = read_table(user, "|", ("user_id", "age", "gender", "occupation", "zip_code"), encoding="latin-1")
        return RawData(interactions, items, users, lines_of(data, 1), lines_of(item, 1))

    def fingerprint(self) -> str:
        """Hash of the files' contents."""
        return hash_files(self._paths())

    def _paths(self) -> list[Path]:
        return existing_files(self.root, ("u.data", "u.item", "u.user"))


class MovieLens1MReader(FilesSettings):
    """``ratings.dat``, ``movies.dat`` and ``users.dat``, or RecBole's atomic files; every rating is an interaction."""

    def read(self) -> RawData:
        """Read the published files or the atomic ones.

        Raises:
            DataError: If neither exists, or a line is malformed.
        """
        if self._is_atomic():
            return AtomicReader(self.root).read()
        ratings, movies, people = self._paths()
        items = read_table(movies, "::", ("item_id", "title", "genre"), encoding="latin-1")
        items["genre"] = items["genre"].str.replace("|", " ", regex=False)
        users = read_table(people, "::", ("user_id", "gender", "age", "occupation", "zip_code"), encoding="latin-1")
        return RawData(_interactions(ratings, "::"), items, users, lines_of(ratings, 1), lines_of(movies, 1))

    def fingerprint(self) -> str:
        """Hash of the files' contents."""
        return AtomicReader(self.root).fingerprint() if self._is_atomic() else hash_files(self._paths())

    def _is_atomic(self) -> bool:
        folder = Path(self.root).expanduser()
        return not (folder / "ratings.dat").exists() and any(folder.glob("*.inter"))

    def _paths(self) -> list[Path]:
        return existing_files(
            self.root, ("ratings.dat", "movies.dat", "users.dat"), "RecBole's *.inter, *.item, *.user"
        )


def _interactions(path: Path, separator: str) -> pd.DataFrame:
    table = read_table(path, separator, _INTERACTIONS, encoding="latin-1")
    table["timestamp"] = to_numbers(table["timestamp"], path, first_line=1)
    return table[["user_id", "item_id", "timestamp"]]
