"""Ragged arrays and training rows equal plain loops over lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fellrec.data.ragged import Ragged
from fellrec.data.windows import last_position_rows, windows

ROWS = st.lists(st.lists(st.integers(0, 50), max_size=12), min_size=1, max_size=8)


@given(ROWS, st.integers(1, 5))
def test_last_returns_the_padded_end_of_each_row(rows: list[list[int]], count: int) -> None:
    padded = Ragged.from_rows(rows).last(count)
    for row, got in zip(rows, padded, strict=True):
        tail = row[-count:]
        assert got.tolist() == tail + [-1] * (count - len(tail))


@given(ROWS, ROWS)
def test_join_appends_row_by_row(left: list[list[int]], right: list[list[int]]) -> None:
    number = min(len(left), len(right))
    joined = Ragged.from_rows(left[:number]).join(Ragged.from_rows(right[:number]))
    assert [joined.row(i).tolist() for i in range(number)] == [left[i] + right[i] for i in range(number)]


@given(ROWS, st.data())
def test_take_keeps_the_given_order_and_repetitions(rows: list[list[int]], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=10))
    taken = Ragged.from_rows(rows).take(np.array(chosen, dtype=np.int64))
    assert [taken.row(i).tolist() for i in range(len(chosen))] == [rows[i] for i in chosen]


def pairs(items: np.ndarray, is_target: np.ndarray) -> list[tuple[tuple[int, ...], int]]:
    return [
        (tuple(row[:j].tolist()), int(row[j])) for row, flags in zip(items, is_target) for j in np.flatnonzero(flags)
    ]


@given(ROWS, st.integers(1, 5), st.data())
def test_each_chosen_position_is_predicted_once(rows: list[list[int]], history: int, data: st.DataObject) -> None:
    train = Ragged.from_rows(rows)
    total = len(train.values)
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), dtype=bool)
    first = set(train.offsets[:-1].tolist())
    wanted = [
        (tuple(row[max(0, p - history) : p]), row[p])
        for r, row in enumerate(rows)
        for p in range(1, len(row))
        if chosen[train.offsets[r] + p]
    ]
    one_each = last_position_rows(train, chosen, history)
    assert sorted(pairs(one_each.items, one_each.is_target)) == sorted(wanted)
    many = windows(train, chosen, history)
    assert many.is_target.sum() == len(wanted) == sum(chosen[i] for i in range(total) if i not in first)
    # A target in a window is predicted from a suffix of its history, of at most ``history`` items.
    for (context, target), (full, same) in zip(
        pairs(many.items, many.is_target), pairs(one_each.items, one_each.is_target), strict=True
    ):
        assert target == same
        assert full[len(full) - len(context) :] == context
        assert 1 <= len(context) <= history
