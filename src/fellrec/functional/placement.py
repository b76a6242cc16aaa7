"""Assignment of the clients of a round to worker processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def place(costs: Sequence[float], num_workers: int) -> tuple[tuple[int, ...], ...]:
    """Assign jobs to workers, longest first, each to the worker with the smallest load (LPT scheduling).

    The makespan is at most 4/3 - 1/(3 W) times the optimum (Graham, 1969, "Bounds on multiprocessing timing
    anomalies", theorem 2). Ties go to the earlier job and the lower worker.

    Args:
        costs: Cost of each job, at least 0.
        num_workers: W.

    Returns:
        Indices of the jobs of each worker, in execution order.

    Example:
        >>> place([3.0, 5.0, 4.0, 4.0], num_workers=2)
        ((1, 0), (2, 3))
        >>> place([1.0], num_workers=3)
        ((0,), (), ())
    """
    loads = [0.0] * num_workers
    placed: list[list[int]] = [[] for _ in range(num_workers)]
    for job in sorted(range(len(costs)), key=lambda job: (-costs[job], job)):
        worker = min(range(num_workers), key=lambda worker: (loads[worker], len(placed[worker]), worker))
        placed[worker].append(job)
        loads[worker] += costs[job]
    return tuple(tuple(jobs) for jobs in placed)


def estimate_seconds(
    clients: Sequence[int], num_steps: Mapping[int, int], measured: Mapping[int, float]
) -> tuple[float, ...]:
    """Estimate the duration of each client's local training: the last measurement, or by its number of steps.

    Args:
        clients: The cohort.
        num_steps: Local steps per round of each client of the cohort.
        measured: Seconds of clients that were trained before.

    Returns:
        Seconds per client of the cohort. Without any measurement only their ratios are meaningful.

    Example:
        Client 0 took two seconds for four steps, so the estimate for two steps of client 1 is one second.

        >>> estimate_seconds([0, 1], {0: 4, 1: 2}, {0: 2.0})
        (2.0, 1.0)
        >>> estimate_seconds([0, 1], {0: 4, 1: 2}, {})
        (4.0, 2.0)
    """
    known = [client for client in clients if client in measured]
    steps = sum(num_steps[client] for client in known)
    per_step = sum(measured[client] for client in known) / steps if steps else 1.0
    return tuple(measured.get(client, num_steps[client] * per_step) for client in clients)
