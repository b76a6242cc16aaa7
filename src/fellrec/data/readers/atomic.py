"""RecBole's atomic files, the generic format: ``<name>.inter``, ``<name>.item`` and, if present, ``<name>.user``."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from fellrec.data.readers.table import existing_files, hash_files, lines_of, read_table, require_columns, to_numbers
from fellrec.data.schema import RawData
from fellrec.data.settings import AtomicSettings
from fellrec.errors import DataError, unknown

TITLES = ("title", "movie_title", "item_name", "name")


class AtomicReader(AtomicSettings):
    """Tab-separated UTF-8 files whose header has name and type of each column, such as ``user_id:token``."""

    def read(self) -> RawData:
        """Read the files.

        Raises:
            DataError: If a file or column is missing or a line is malformed.
        """
        paths = self._paths()
        interactions = _columns(paths[0])
        items = _columns(paths[1])
        users = _columns(paths[2]) if paths[2].exists() else interactions[["user_id"]].drop_duplicates()
        require_columns(interactions, ("user_id", "item_id", "timestamp"), paths[0])
        require_columns(items, ("item_id",), paths[1])
        require_columns(users, ("user_id",), paths[2])
        interactions["timestamp"] = to_numbers(interactions["timestamp"], paths[0], first_line=2)
        items = items.rename(columns={self._title(items, paths[1]): "title", "genres": "genre"})
        return RawData(
            interactions[["user_id", "item_id", "timestamp"]],
            items,
            users.reset_index(drop=True),
            lines_of(paths[0], 2),
            lines_of(paths[1], 2),
        )

    def fingerprint(self) -> str:
        """Hash of the files' contents."""
        return hash_files(self._paths()) + f"|{self.title_column}"

    def _paths(self) -> list[Path]:
        existing_files(self.root, ())
        folder = Path(self.root).expanduser()
        found = sorted(folder.glob("*.inter"))
        if self.name is None and len(found) != 1:
            raise DataError(f"{folder} has {len(found)} .inter files, expected one; select it with data.reader.name")
        stem = self.name or found[0].stem
        return [*existing_files(self.root, (f"{stem}.inter", f"{stem}.item")), folder / f"{stem}.user"]

    def _title(self, items: pd.DataFrame, path: Path) -> str:
        wanted = (self.title_column,) if self.title_column else TITLES
        for name in wanted:
            if name in items.columns:
                return name
        raise DataError(f"{path} has no title: {unknown('column', ' or '.join(wanted), items.columns)}")


def _columns(path: Path) -> pd.DataFrame:
    table = read_table(path, "\t")
    return table.rename(columns=lambda name: str(name).partition(":")[0])
