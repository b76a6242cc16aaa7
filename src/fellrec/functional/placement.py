"""Which rank trains which client: longest first onto the least loaded rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def place(costs: Sequence[float], num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Place jobs on ranks by their cost, the longest first, each onto the rank with the least to do so far.

    The last rank to finish takes at most 4/3 - 1/(3 R) times as long as in the best placement (Graham, 1969, "Bounds on
    multiprocessing timing anomalies", theorem 2). Ties go to the earlier job and the lower rank.

    Args:
        costs: Of each job, at least 0.
        num_ranks: R.

    Returns:
        Positions of the jobs of each rank, in the order in which it does them.

    Example:
        >>> place([3.0, 5.0, 4.0, 4.0], num_ranks=2)
        ((1, 0), (2, 3))
        >>> place([1.0], num_ranks=3)
        ((0,), (), ())
    """
    loads = [0.0] * num_ranks
    placed: list[list[int]] = [[] for _ in range(num_ranks)]
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        rank = min(range(num_ranks), key=lambda rank: (loads[rank], len(placed[rank]), rank))
        placed[rank].append(job)
        loads[rank] += costs[job]
    return tuple(tuple(jobs) for jobs in placed)


def estimate_seconds(
    clients: Sequence[int], num_steps: Mapping[int, int], measured: Mapping[int, float]
) -> tuple[float, ...]:
    """How long each client's local training will take: as long as the last time, or by its number of steps.

    Args:
        clients: The cohort.
        num_steps: Local steps of each of its clients in a round.
        measured: Seconds of the clients that were trained before.

    Returns:
        Seconds per client of the cohort; only their ratios mean something as long as nothing was measured.

    Example:
        Client 0 took two seconds for four steps, so client 1 will take one for its two.

        >>> estimate_seconds([0, 1], {0: 4, 1: 2}, {0: 2.0})
        (2.0, 1.0)
        >>> estimate_seconds([0, 1], {0: 4, 1: 2}, {})
        (4.0, 2.0)
    """
    known = [client for client in clients if client in measured]
    steps = sum(num_steps[client] for client in known)
    per_step = sum(measured[client] for client in known) / steps if steps else 1.0
    return tuple(measured.get(client, num_steps[client] * per_step) for client in clients)
