"""Values that depend on the size of a client: a step function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def by_size(steps: Mapping[int, int], sizes: Sequence[int]) -> list[int]:
    """The value of each client, by its size.

    Args:
        steps: Least size → value; one is for 0.
        sizes: Of the clients, at least 0.

    Returns:
        For each client the value of the largest key that is at most its size.

    Example:
        >>> by_size({0: 4, 100: 8, 1000: 16}, [99, 100, 5000])
        [4, 8, 16]
    """
    ascending = sorted(steps)
    return [steps[max(least for least in ascending if least <= size)] for size in sizes]
