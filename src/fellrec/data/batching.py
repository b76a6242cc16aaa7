"""Batches of training rows of similar length, and groups of similar length in a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW_BATCHES = 50
"""Number of batches whose rows are sorted by length together. Larger windows save little padding and shuffle less."""

LEAST_SAVING = 500
"""Padded tokens that a further group of a batch must save: each forward and backward pass takes time of its own.
Measured with the tiny backbone on a CPU, whose passes cost most in tokens."""


def length_groups(lengths: Tensor, least_saving: int = LEAST_SAVING) -> list[Tensor]:
    """Divide the rows of a batch into groups of similar length, each to be padded to its longest row.

    A group is divided in two where most padding is saved, as long as that is enough.

    Args:
        lengths: ``[B]`` int64 number of tokens of each row.
        least_saving: Padded tokens that a division must save.

    Returns:
        Rows of each group, ascending; the first one has the longest rows.

    Example:
        >>> [rows.tolist() for rows in length_groups(torch.tensor([2, 9, 1, 8]), least_saving=10)]
        [[1, 3], [0, 2]]
    """
    by_length = lengths.argsort(descending=True, stable=True)
    return [by_length[start:end].sort().values for start, end in _divided(lengths[by_length], 0, least_saving)]


def _divided(lengths: Tensor, start: int, least_saving: int) -> list[tuple[int, int]]:
    """Beginning and end of each group of descending lengths, counted from ``start``."""
    size = len(lengths)
    if size > 1:
        first = torch.arange(1, size)
        saved = (size - first) * (lengths[0] - lengths[1:])
        place = int(saved.argmax())
        if int(saved[place]) >= least_saving:
            cut = place + 1
            return _divided(lengths[:cut], start, least_saving) + _divided(lengths[cut:], start + cut, least_saving)
    return [(start, start + size)]


def batches_in_order(order: Sequence[int], members: Tensor, batch_size: int) -> list[list[int]]:
    """Divide rows into batches, none of which has rows of several members of a federation.

    Args:
        order: Rows in the order of the batches.
        members: ``[N]`` int64 member of each row.
        batch_size: Rows per batch.

    Example:
        >>> batches_in_order([3, 0, 2, 1], torch.tensor([0, 1, 0, 0]), 2)
        [[3, 0], [2], [1]]
    """
    index = torch.tensor(order, dtype=torch.long)
    member_of_row = members[index]
    parts = [index[member_of_row == member] for member in member_of_row.unique()]
    return [batch.tolist() for part in parts for batch in part.split(batch_size)]


def shuffled_batches(
    members: Tensor, lengths: Tensor | None, batch_size: int, generator: torch.Generator
) -> list[list[int]]:
    """Batches of training rows in random order, none of which has rows of several members of a federation.

    Args:
        members: ``[N]`` int64 member of each row.
        lengths: ``[N]`` int64 number of tokens of each row, to batch rows of similar length; ``None`` to only shuffle.
        batch_size: Rows per batch.
        generator: Source of the order.
    """
    found: list[list[int]] = []
    for member in members.unique():
        rows = (members == member).nonzero()[:, 0]
        if lengths is None:
            shuffled = rows[torch.randperm(len(rows), generator=generator)]
            found += [batch.tolist() for batch in shuffled.split(batch_size)]
        else:
            own = length_grouped_batches(lengths[rows], batch_size, generator)
            found += [rows[torch.tensor(batch)].tolist() for batch in own]
    return [found[number] for number in torch.randperm(len(found), generator=generator).tolist()]


def length_grouped_batches(
    lengths: Tensor, batch_size: int, generator: torch.Generator, window_batches: int = WINDOW_BATCHES
) -> list[list[int]]:
    """Group rows of similar length into batches, in random order.

    The rows are shuffled, sorted by length within windows and divided into batches; then the batches are shuffled.
    Every row is in one batch. All batches but one are full.

    Args:
        lengths: ``[N]`` int64 number of tokens of each row.
        batch_size: Rows per batch.
        generator: Source of the order.
        window_batches: Batches per window.

    Returns:
        Row indices of each batch.

    Example:
        >>> batches = length_grouped_batches(torch.tensor([1, 9, 2, 8]), 2, torch.Generator().manual_seed(0))
        >>> sorted(sorted(batch) for batch in batches)
        [[0, 2], [1, 3]]
    """
    if not len(lengths):
        return []
    shuffled = torch.randperm(len(lengths), generator=generator)
    window = torch.arange(len(lengths)) // (window_batches * batch_size)
    by_length = (window * (int(lengths.max()) + 1) + lengths[shuffled]).argsort(stable=True)
    batches = shuffled[by_length].split(batch_size)
    return [batches[number].tolist() for number in torch.randperm(len(batches), generator=generator).tolist()]
