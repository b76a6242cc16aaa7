"""MicroLens-100k as published: short videos, their English titles, and who commented on which (Ni et al. 2023)."""

from __future__ import annotations

from pathlib import Path

from fellrec.data.readers.folder import FILES, existing_files, hash_files
from fellrec.data.readers.table import lines_of, read_table, require_columns, to_times
from fellrec.data.schema import RawData
from fellrec.data.settings import FilesSettings

PAIRS, TITLES = FILES["micro_lens"]
_PUBLISHED = {"user": "user_id", "item": "item_id", "timestamp": "timestamp"}


class MicroLensReader(FilesSettings):
    """``MicroLens-100k_pairs.csv`` and ``MicroLens-100k_title_en.csv``; every line of the first is an interaction.

    The first has the header ``user,item,timestamp``, with times in milliseconds. The second is published without a
    header, as ``1, a title``; one that starts with ``item,title`` is read too. A title may hold commas, or be empty: 72
    of those published are, so ``data.on_empty_title`` must be ``item_id`` for them.
    """

    def read(self) -> RawData:
        """Read the files.

        Raises:
            DataError: If a file or column is missing or a line is malformed.
        """
        pairs, titles = self._paths()
        interactions = read_table(pairs, ",")
        require_columns(interactions, tuple(_PUBLISHED), pairs)
        interactions = interactions[list(_PUBLISHED)].rename(columns=_PUBLISHED)
        interactions["timestamp"] = to_times(interactions["timestamp"], lines_of(pairs, 2))
        items = read_table(titles, ",", ("item_id", "title"), last_is_free=True)
        has_header = items.loc[0, "item_id"].strip().lower() == "item"
        items = items.iloc[int(has_header) :].reset_index(drop=True)
        items["title"] = items["title"].str.strip()
        users = interactions[["user_id"]].drop_duplicates().reset_index(drop=True)
        return RawData(interactions, items, users, lines_of(pairs, 2), lines_of(titles, 1 + has_header))

    def fingerprint(self) -> str:
        """Hash of the files' contents."""
        return hash_files(self._paths())

    def check(self) -> None:
        """Raise a ``DataError`` unless the files exist."""
        self._paths()

    def _paths(self) -> list[Path]:
        return existing_files(self.root, (PAIRS, TITLES))
