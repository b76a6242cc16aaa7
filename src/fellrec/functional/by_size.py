"""Values that depend on the size of a client: a step function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fellrec.errors import ConfigError

PerClient = int | Sequence[int] | Mapping[int, int]
"""A number for all clients, that of each client, or numbers by size, see `by_size`."""


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


def of_clients(value: PerClient, sizes: Sequence[int], setting: str) -> list[int]:
    """The number that a setting gives each client.

    Args:
        value: One for all, that of each client, or numbers by size.
        sizes: Of the clients, at least 0.
        setting: Its name, for messages.

    Raises:
        ConfigError: If a list has not one number for each client.

    Example:
        >>> [of_clients(value, [9, 70], "adapter.rank") for value in (4, [1, 2], {0: 2, 50: 8})]
        [[4, 4], [1, 2], [2, 8]]
    """
    if isinstance(value, Mapping):
        return by_size(value, sizes)
    values = [value] * len(sizes) if isinstance(value, int) else list(value)
    check_length(values, len(sizes), setting)
    return values


def check_length(values: Sequence[int], num_clients: int, setting: str) -> None:
    """Refuse a list that has not one number for each client.

    Raises:
        ConfigError: If it has not.
    """
    if len(values) != num_clients:
        raise ConfigError(
            f"{setting}={list(values)} has {len(values)} values, and there are {num_clients} clients: "
            "give one for each client, or one number for all"
        )


def distinct_numbers(value: PerClient) -> tuple[int, ...]:
    """The numbers that occur in such a setting, ascending.

    Example:
        >>> distinct_numbers(4), distinct_numbers([2, 1, 2]), distinct_numbers({0: 2, 50: 8})
        ((4,), (1, 2), (2, 8))
    """
    if isinstance(value, int):
        return (value,)
    return tuple(sorted(set(value.values() if isinstance(value, Mapping) else value)))
