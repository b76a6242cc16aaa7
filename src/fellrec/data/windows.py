"""Training rows: windows of users' sequences with the positions to predict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fellrec.data.ragged import IntArray, Ragged


@dataclass(frozen=True)
class TrainingRows:
    """Windows of users' sequences with the positions to predict.

    Attributes:
        items: ``[rows, W + 1]`` int64 item indices, oldest first, padded with -1 on the right.
        is_target: ``[rows, W + 1]`` bool; position ``j`` is predicted from positions ``0..j-1``. Column 0 is never
            a target.
    """

    items: IntArray
    is_target: NDArray[np.bool_]


def windows(train: Ragged, is_target: NDArray[np.bool_], max_history: int) -> TrainingRows:
    """Divide each sequence into windows of ``max_history + 1`` items; adjacent windows overlap by one item.

    Every position but the first of a sequence is predicted in exactly one row, from at most ``max_history`` items.
    One forward pass trains up to ``max_history`` targets per row.

    Args:
        train: One sequence per user.
        is_target: ``[len(train.values)]`` bool, interactions to predict.
        max_history: Longest history, at least 1.

    Example:
        >>> rows = windows(Ragged.from_rows([[5, 6, 7, 8]]), np.array([False, True, True, True]), max_history=2)
        >>> rows.items.tolist()
        [[5, 6, 7], [7, 8, -1]]
    """
    per_user = (np.maximum(train.lengths - 1, 0) + max_history - 1) // max_history
    user = np.repeat(np.arange(len(train)), per_user)
    first = np.concatenate([[0], np.cumsum(per_user)])[:-1]
    start = (np.arange(len(user)) - first[user]) * max_history
    return _gather(train, is_target, train.offsets[user] + start, train.offsets[user + 1], max_history)


def last_position_rows(train: Ragged, is_target: NDArray[np.bool_], max_history: int) -> TrainingRows:
    """Build one row per target, with the ``max_history`` items before it.

    Args:
        train: One sequence per user.
        is_target: ``[len(train.values)]`` bool, interactions to predict.
        max_history: Longest history, at least 1.

    Example:
        >>> rows = last_position_rows(Ragged.from_rows([[5, 6, 7]]), np.array([False, True, True]), max_history=1)
        >>> rows.items.tolist()
        [[5, 6], [6, 7]]
    """
    target = np.flatnonzero(is_target & (train.positions > 0))
    begin = np.maximum(train.offsets[train.row_index[target]], target - max_history)
    rows = _gather(train, is_target, begin, target + 1, max_history)
    last = (rows.items >= 0).sum(axis=1) - 1
    only_last = np.zeros_like(rows.is_target)
    only_last[np.arange(len(last)), last] = True
    return TrainingRows(rows.items, only_last)


def _gather(
    train: Ragged, is_target: NDArray[np.bool_], begin: IntArray, end: IntArray, max_history: int
) -> TrainingRows:
    source = begin[:, None] + np.arange(max_history + 1)[None, :]
    inside = source < end[:, None]
    source = np.where(inside, source, 0)
    items = np.where(inside, train.values[source], -1)
    predicted = inside & is_target[source]
    predicted[:, 0] = False
    used = predicted.any(axis=1)
    return TrainingRows(items[used], predicted[used])
