"""Sampling of the clients that take part in a round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fellrec.functional.rng import derive_seed


def weighted_draw(weights: Sequence[float], size: int, seed: int, round_index: int) -> tuple[int, ...]:
    """Draw clients without replacement, each next one with a probability that is proportional to its weight.

    Args:
        weights: Of each client, not negative; clients of weight 0 are drawn last.
        size: How many.
        seed: Seed of the run.
        round_index: Round, from 0.

    Returns:
        Client indices, ascending.

    Example:
        >>> weighted_draw([1.0, 0.0, 5.0], 2, seed=0, round_index=0)
        (0, 2)
    """
    generator = np.random.default_rng(derive_seed(seed, "candidates", round_index))
    # The first arrivals of independent exponential clocks are such a draw.
    with np.errstate(divide="ignore"):
        arrivals = generator.exponential(size=len(weights)) / np.asarray(weights, dtype=float)
    return tuple(sorted(np.lexsort((np.arange(len(weights)), arrivals))[:size].tolist()))


def largest(losses: Mapping[int, float], size: int) -> tuple[int, ...]:
    """The clients with the largest losses; of equal ones those with lower numbers, and NaN counts as the largest.

    Example:
        >>> largest({3: 0.5, 5: 0.9, 8: 0.9, 9: float("nan")}, 2)
        (5, 9)
    """
    ordered = sorted(losses, key=lambda client: (not math.isnan(losses[client]), -losses[client], client))
    return tuple(sorted(ordered[:size]))


def cohort_size(num_clients: int, rate: float) -> int:
    """``ceil(rate · num_clients)``, at least 1, safe from rounding.

    Example:
        >>> cohort_size(10, 0.25), cohort_size(10, 0.3)
        (3, 3)
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
    size = cohort_size(num_clients, rate)
    generator = np.random.default_rng(derive_seed(seed, "cohort", round_index))
    return tuple(sorted(generator.choice(num_clients, size=size, replace=False).tolist()))
