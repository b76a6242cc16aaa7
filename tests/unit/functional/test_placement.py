"""Placement of clients on ranks: laws, and Graham's bound against the best placement."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from fellrec.functional.placement import estimate_seconds, place

COSTS = st.lists(st.floats(0, 1e6), max_size=30)


def longest(costs: list[float], placed: tuple[tuple[int, ...], ...]) -> float:
    return max(sum(costs[job] for job in jobs) for jobs in placed)


@given(COSTS, st.integers(1, 8))
def test_every_job_has_one_rank_and_the_longest_comes_first(costs: list[float], num_ranks: int) -> None:
    placed = place(costs, num_ranks)
    assert len(placed) == num_ranks
    assert sorted(job for jobs in placed for job in jobs) == list(range(len(costs)))
    for jobs in placed:
        assert [costs[job] for job in jobs] == sorted((costs[job] for job in jobs), reverse=True)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=7), st.integers(1, 3))
def test_it_is_within_grahams_bound_of_the_best(costs: list[int], num_ranks: int) -> None:
    """The best is found by trying all."""
    best = min(
        max(sum(cost for cost, rank in zip(costs, ranks) if rank == r) for r in range(num_ranks))
        for ranks in product(range(num_ranks), repeat=len(costs))
    )
    assert (
        longest([float(cost) for cost in costs], place(costs, num_ranks)) <= (4 / 3 - 1 / (3 * num_ranks)) * best + 1e-9
    )


@given(st.lists(st.floats(1, 100), min_size=1, max_size=20), st.integers(1, 5))
def test_no_rank_idles_while_another_has_two(costs: list[float], num_ranks: int) -> None:
    sizes = [len(jobs) for jobs in place(costs, num_ranks)]
    assert min(sizes) > 0 or max(sizes) <= 1


@given(COSTS, st.integers(1, 8))
def test_it_is_the_same_every_time(costs: list[float], num_ranks: int) -> None:
    assert place(costs, num_ranks) == place(list(costs), num_ranks)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=10), st.floats(0.01, 10))
def test_estimates_are_exact_where_seconds_follow_steps(steps: list[int], per_step: float) -> None:
    """Half of the clients were measured; all take the same time per step."""
    clients = list(range(len(steps)))
    measured = {client: steps[client] * per_step for client in clients[::2]}
    found = estimate_seconds(clients, dict(enumerate(steps)), measured)
    for client in clients:
        assert abs(found[client] - steps[client] * per_step) < 1e-9 * steps[client] * per_step + 1e-12
