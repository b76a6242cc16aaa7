"""Assignment of clients to workers: properties, and Graham's bound against the optimum."""

from __future__ import annotations

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from fellrec.functional.placement import estimate_seconds, place

COSTS = st.lists(st.floats(0, 1e6), max_size=30)


def longest(costs: list[float], placed: tuple[tuple[int, ...], ...]) -> float:
    return max(sum(costs[job] for job in jobs) for jobs in placed)


@given(COSTS, st.integers(1, 8))
def test_every_job_has_one_worker_and_longer_jobs_come_first(costs: list[float], num_workers: int) -> None:
    placed = place(costs, num_workers)
    assert len(placed) == num_workers
    assert sorted(job for jobs in placed for job in jobs) == list(range(len(costs)))
    for jobs in placed:
        assert [costs[job] for job in jobs] == sorted((costs[job] for job in jobs), reverse=True)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=7), st.integers(1, 3))
def test_the_makespan_is_within_grahams_bound(costs: list[int], num_workers: int) -> None:
    """The optimum is found by exhaustive search."""
    best = min(
        max(sum(cost for cost, worker in zip(costs, workers) if worker == w) for w in range(num_workers))
        for workers in product(range(num_workers), repeat=len(costs))
    )
    assert (
        longest([float(cost) for cost in costs], place(costs, num_workers))
        <= (4 / 3 - 1 / (3 * num_workers)) * best + 1e-9
    )


@given(st.lists(st.floats(1, 100), min_size=1, max_size=20), st.integers(1, 5))
def test_no_worker_is_idle_while_another_has_two_jobs(costs: list[float], num_workers: int) -> None:
    sizes = [len(jobs) for jobs in place(costs, num_workers)]
    assert min(sizes) > 0 or max(sizes) <= 1


@given(COSTS, st.integers(1, 8))
def test_the_assignment_is_deterministic(costs: list[float], num_workers: int) -> None:
    assert place(costs, num_workers) == place(list(costs), num_workers)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=10), st.floats(0.01, 10))
def test_estimates_are_exact_if_all_clients_take_the_same_time_per_step(steps: list[int], per_step: float) -> None:
    """Half of the clients were measured."""
    clients = list(range(len(steps)))
    measured = {client: steps[client] * per_step for client in clients[::2]}
    found = estimate_seconds(clients, dict(enumerate(steps)), measured)
    for client in clients:
        assert abs(found[client] - steps[client] * per_step) < 1e-9 * steps[client] * per_step + 1e-12
