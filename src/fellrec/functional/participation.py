"""Sampling of the clients that take part in a round."""

from __future__ import annotations

import math

import numpy as np

from fellrec.functional.rng import derive_seed


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
    size = min(num_clients, max(1, math.ceil(rate * num_clients - 1e-9)))
    generator = np.random.default_rng(derive_seed(seed, "cohort", round_index))
    return tuple(sorted(generator.choice(num_clients, size=size, replace=False).tolist()))
