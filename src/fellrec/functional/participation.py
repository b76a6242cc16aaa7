"""Sampling of the clients that take part in a round, and how long they take on the simulated clock."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fellrec.functional.rng import derive_seed


def cohort_size(num_clients: int, rate: float) -> int:
    """``ceil(rate · num_clients)``, at least one, and at most all of them.

    Example:
        >>> cohort_size(10, 0.25), cohort_size(10, 0.3), cohort_size(10, 1.0)
        (3, 3, 10)
    """
    return min(num_clients, max(1, math.ceil(rate * num_clients - 1e-9)))


def cohort(num_clients: int, rate: float, seed: int, round_index: int) -> tuple[int, ...]:
    """Draw ``ceil(rate · num_clients)`` clients, at least one, without replacement, from the seed and round.

    Args:
        num_clients: Size of the population.
        rate: Fraction of the population that takes part, in (0, 1].
        seed: Seed of the run.
        round_index: Round, from 0.

    Returns:
        Client indices, ascending.

    Example:
        >>> cohort(4, 1.0, seed=0, round_index=0)
        (0, 1, 2, 3)
        >>> len(cohort(10, 0.25, seed=0, round_index=3))
        3
    """
    generator = np.random.default_rng(derive_seed(seed, "cohort", round_index))
    return tuple(sorted(generator.choice(num_clients, cohort_size(num_clients, rate), replace=False).tolist()))


def draw_by_weight(weights: NDArray[np.float64], size: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Draw indices without replacement, one after the other, each with a probability proportional to its weight.

    By the Gumbel trick: the largest of ``log(weight) + Gumbel noise``. Indices of weight 0 come after all others, in
    random order.

    Args:
        weights: ``[C]`` floats of at least 0.
        size: How many, at most C.
        generator: Of the random numbers.

    Returns:
        ``[size]`` distinct indices, in the order in which they were drawn.

    Example:
        >>> draw_by_weight(np.array([0.0, 1.0, 0.0]), 1, np.random.default_rng(0)).tolist()
        [1]
    """
    noise = generator.gumbel(size=len(weights))
    is_zero = weights <= 0
    keys = np.log(np.where(is_zero, 1.0, weights)) + noise
    order = np.lexsort((-keys, is_zero))
    return order[:size].astype(np.int64)


def slowdowns(num_clients: int, largest: float, seed: int) -> NDArray[np.float64]:
    """By which factor each client is slower than the fastest possible: log-uniform from 1 to ``largest``.

    Args:
        num_clients: C.
        largest: At least 1.
        seed: Of the run.

    Returns:
        ``[C]`` floats.

    Example:
        >>> slowdowns(3, 1.0, seed=0).tolist()
        [1.0, 1.0, 1.0]
    """
    generator = np.random.default_rng(derive_seed(seed, "slowdown"))
    return np.exp(generator.random(num_clients) * math.log(largest))


def drops_out(num_clients: int, rate: float, seed: int, draw: int) -> NDArray[np.bool_]:
    """Which clients would drop out of one draw, each with probability ``rate``: from the seed and the draw only.

    Args:
        num_clients: C.
        rate: In [0, 1).
        seed: Of the run.
        draw: Number of the draw, from 0.

    Returns:
        ``[C]`` booleans.

    Example:
        >>> drops_out(3, 0.0, seed=0, draw=0).tolist()
        [False, False, False]
    """
    return np.random.default_rng(derive_seed(seed, "dropout", draw)).random(num_clients) < rate
