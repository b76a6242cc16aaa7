"""Ragged arrays: rows of different lengths in one flat array, for vectorised operations over users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Ragged:
    """One row of item indices per user, oldest first.

    Attributes:
        values: ``[total]`` int64, all rows concatenated.
        offsets: ``[rows + 1]`` int64; row ``r`` is ``values[offsets[r]:offsets[r + 1]]``.

    Example:
        >>> rows = Ragged.from_rows([[7, 8], [], [9]])
        >>> len(rows), rows.lengths.tolist(), rows.row(0).tolist()
        (3, [2, 0, 1], [7, 8])
    """

    values: IntArray
    offsets: IntArray

    @classmethod
    def from_rows(cls, rows: list[list[int]]) -> Ragged:
        """Build from Python lists; for small inputs."""
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        values = np.array([value for row in rows for value in row], dtype=np.int64)
        return cls(values, offsets_of(lengths))

    @classmethod
    def from_pairs(cls, rows: IntArray, values: IntArray, num_rows: int) -> Ragged:
        """Group ``values`` by ``rows`` (both ``[n]``), keeping the given order inside each row."""
        order = np.argsort(rows, kind="stable")
        lengths = np.bincount(rows, minlength=num_rows).astype(np.int64)
        return cls(np.asarray(values, dtype=np.int64)[order], offsets_of(lengths))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> IntArray:
        """``[rows]`` int64 number of values in each row."""
        return np.diff(self.offsets)

    @property
    def row_index(self) -> IntArray:
        """``[total]`` int64 row of each value."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    @property
    def positions(self) -> IntArray:
        """``[total]`` int64 position of each value in its row, from 0."""
        return np.arange(len(self.values), dtype=np.int64) - np.repeat(self.offsets[:-1], self.lengths)

    def row(self, index: int) -> IntArray:
        """The values of one row."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: IntArray) -> Ragged:
        """The given rows, in the given order, as a new ragged array."""
        lengths = self.lengths[rows]
        offsets = offsets_of(lengths)
        source = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths) + np.repeat(self.offsets[rows], lengths)
        return Ragged(self.values[source], offsets)

    def join(self, other: Ragged) -> Ragged:
        """Append ``other``'s row ``r`` to row ``r``; both must have the same number of rows."""
        rows = np.concatenate([self.row_index, other.row_index])
        return Ragged.from_pairs(rows, np.concatenate([self.values, other.values]), len(self))

    def distinct(self) -> Ragged:
        """The first occurrence of each value in its row.

        Example:
            >>> Ragged.from_rows([[7, 8, 7], [7]]).distinct().values.tolist()
            [7, 8, 7]
        """
        rows = self.row_index
        keys = rows * (int(self.values.max(initial=0)) + 1) + self.values
        first = np.sort(np.unique(keys, return_index=True)[1])
        return Ragged.from_pairs(rows[first], self.values[first], len(self))

    def last(self, count: int) -> IntArray:
        """The last ``count`` values of each row, oldest first, ``[rows, count]``, padded with -1 on the right."""
        kept = np.minimum(self.lengths, count)
        column = np.arange(count, dtype=np.int64)[None, :]
        source = (self.offsets[1:] - kept)[:, None] + column
        inside = column < kept[:, None]
        padded = np.full((len(self), count), -1, dtype=np.int64)
        padded[inside] = self.values[source[inside]]
        return padded


def offsets_of(lengths: IntArray) -> IntArray:
    """Row offsets ``[rows + 1]`` for the given row lengths ``[rows]``."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
