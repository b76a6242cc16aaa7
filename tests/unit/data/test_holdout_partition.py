"""Holdouts of interactions and partitions of users."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from fellrec.data.filters import k_core
from fellrec.data.holdout import TEST, TRAIN, VALID, GlobalTime, LeaveOneOut
from fellrec.data.partition import (
    AttributePartition,
    DirichletPartition,
    KMeansPartition,
    PartitionInput,
    PerUserPartition,
    RandomPartition,
    by_size,
)
from fellrec.data.ragged import Ragged
from fellrec.data.schema import Catalogue
from fellrec.errors import ConfigError, DataError

ROWS = st.lists(st.lists(st.integers(0, 50), max_size=8), min_size=1, max_size=8)


@given(ROWS)
def test_leave_one_out_equals_a_loop_over_users(rows: list[list[int]]) -> None:
    histories = Ragged.from_rows(rows)
    stages = LeaveOneOut().assign(histories, np.zeros(len(histories.values)))
    expected = [
        stage
        for row in rows
        for stage in ([TRAIN] * (len(row) - 2) + [VALID, TEST] if len(row) >= 3 else [TRAIN] * len(row))
    ]
    assert stages.tolist() == expected


@given(st.lists(st.floats(0, 1e9), min_size=10, max_size=60, unique=True))
def test_global_time_holds_out_the_latest_interactions(times: list[float]) -> None:
    half = len(times) // 2
    histories = Ragged.from_rows([[0] * half, [0] * (len(times) - half)])
    stages = GlobalTime().assign(histories, np.array(times) + 1.5)
    tenth = int(len(times) * 0.1)
    by_time = stages[np.argsort(times)]
    assert by_time.tolist() == [TRAIN] * (len(times) - 2 * tenth) + [VALID] * tenth + [TEST] * tenth


def test_global_time_refuses_positions_instead_of_timestamps() -> None:
    histories = Ragged.from_rows([[4, 5, 6], [7, 8]])
    with pytest.raises(DataError, match="needs timestamps, but this data set has only the position"):
        GlobalTime().assign(histories, np.array([0, 1, 2, 0, 1], dtype=float))


def assign(rows: list[list[float]]) -> np.ndarray:
    times = np.array([time for row in rows for time in row], dtype=float)
    return GlobalTime().assign(Ragged.from_rows([[0] * len(row) for row in rows]), times)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2, 3], [1, 2], [1]], "only the position of each interaction"),
        ([[2, 3, 5], [1, 2, 4, 5], [2, 4]], "only the position of each interaction"),  # after a filter
        ([[0, 0, 1, 2], [0, 1, 1]], "only the position of each interaction"),  # numbers of orders of several items
        ([[0, 7.5, 90.25], [0, 12.5], [0, 4.75, 5.5]], "count from each user's first interaction"),
        ([[9, 9], [9, 9, 9]], "all timestamps are equal"),
        ([[9, 9], [8, 8, 8], [5]], "all timestamps of each user are equal"),
    ],
)
def test_global_time_refuses_timestamps_that_cannot_be_compared(rows: list[list[float]], message: str) -> None:
    with pytest.raises(DataError, match=f"holdout=global_time needs timestamps, but .*{message}.*leave_one_out"):
        assign(rows)


@pytest.mark.parametrize(
    "rows",
    [
        [[100, 130, 180], [110, 111], [150, 190]],
        [[2001, 2001, 2002], [2002, 2004, 2004], [2001, 2003]],  # years, with ties
        [[5], [5], [7]],
    ],
)
def test_global_time_accepts_times(rows: list[list[float]]) -> None:
    assign(rows)


@pytest.mark.parametrize("rates", [(0.0, 0.1), (0.6, 0.5)])
def test_global_time_refuses_invalid_rates(rates: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="holdout.valid_rate"):
        GlobalTime(*rates).assign(Ragged.from_rows([[1, 2]]), np.array([5.0, 9.0]))


@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=60, unique=True), st.integers(1, 3)
)
def test_k_core_is_the_largest_fixed_point(pairs: list[tuple[int, int]], core: int) -> None:
    """Dropping one user or item with too few interactions at a time, in any order, ends at the same set."""
    left = set(pairs)
    while True:
        dropped = next(
            (
                {p for p in left if p[side] == value}
                for side in (0, 1)
                for value in {p[side] for p in left}
                if sum(p[side] == value for p in left) < core
            ),
            None,
        )
        if not dropped:
            break
        left -= dropped
    frame = pd.DataFrame(pairs, columns=["user_id", "item_id"])
    if not left:
        with pytest.raises(DataError, match="leaves no interactions"):
            k_core(frame, core)
    else:
        assert set(k_core(frame, core).itertuples(index=False, name=None)) == left


def planted(num_users: int = 90) -> tuple[PartitionInput, np.ndarray]:
    """Three groups of users with disjoint items, and numbers of interactions that vary within groups."""
    generator = np.random.default_rng(0)
    group = generator.permutation(np.repeat([0, 1, 2], num_users // 3))
    rows = [(generator.permutation(20)[: generator.integers(5, 20)] + 20 * g).tolist() for g in group]
    catalogue = Catalogue(
        tuple(map(str, range(60))),
        tuple(f"title {i}" for i in range(60)),
        pd.DataFrame({"genre": [f"genre{i // 20}" for i in range(60)]}),
    )
    users = pd.DataFrame({"user_id": map(str, range(num_users)), "gender": np.where(group == 0, "F", "M")})
    return PartitionInput(Ragged.from_rows(rows), users, catalogue), group


def test_kmeans_finds_planted_groups_independent_of_activity() -> None:
    given_data, group = planted()
    labels = KMeansPartition(num_clients=3, num_factors=8).assign(given_data)
    assert adjusted_rand_score(group, labels) > 0.95
    assert labels.tolist() == KMeansPartition(num_clients=3, num_factors=8).assign(given_data).tolist()


def test_random_clients_have_equal_sizes_and_ignore_groups() -> None:
    given_data, group = planted()
    labels = RandomPartition(num_clients=4).assign(given_data)
    sizes = np.bincount(labels)
    assert sizes.max() - sizes.min() <= 1
    assert abs(adjusted_rand_score(group, labels)) < 0.1


def test_attribute_clients_are_the_values_of_the_column() -> None:
    given_data, group = planted()
    labels = AttributePartition("gender").assign(given_data)
    assert adjusted_rand_score(group == 0, labels) == 1.0
    with pytest.raises(ConfigError, match=r"unknown partition.column 'gendre'; choose from: gender"):
        AttributePartition("gendre").assign(given_data)


def test_dirichlet_concentrates_genres() -> None:
    given_data, group = planted(300)
    narrow = DirichletPartition(num_clients=5, concentration=0.05).assign(given_data)
    wide = DirichletPartition(num_clients=5, concentration=1000.0).assign(given_data)
    assert set(narrow) <= set(range(5))
    largest = [pd.crosstab(group, labels, normalize="index").to_numpy().max(axis=1).mean() for labels in (narrow, wide)]
    assert largest[0] > 0.6 > 0.4 > largest[1]


def test_one_client_per_user() -> None:
    given_data, _ = planted()
    assert len(set(PerUserPartition().assign(given_data))) == 90


@pytest.mark.parametrize("partition", [KMeansPartition, RandomPartition, DirichletPartition])
def test_more_clients_than_users_are_refused(partition: type) -> None:
    given_data, _ = planted()
    with pytest.raises(ConfigError, match="partition.num_clients=91 must be at most the number of users, 90"):
        partition(num_clients=91).assign(given_data)


def test_kmeans_of_one_item_is_refused() -> None:
    catalogue = Catalogue(("x",), ("Heat",), pd.DataFrame(index=[0]))
    one_item = PartitionInput(Ragged.from_rows([[0], [0]]), pd.DataFrame({"user_id": ["a", "b"]}), catalogue)
    with pytest.raises(DataError, match="needs at least two users and two items; there are 2 users of clients and 1"):
        KMeansPartition(num_clients=2).assign(one_item)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_clients_are_numbered_by_size(labels: list[int]) -> None:
    numbered = by_size(np.array(labels))
    sizes = np.bincount(numbered)
    assert (sizes > 0).all()
    assert sorted(sizes.tolist(), reverse=True) == sizes.tolist()
    assert adjusted_rand_score(labels, numbered) == 1.0
