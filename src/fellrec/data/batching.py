"""Which training rows share a batch."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW_BATCHES = 50
"""Batches whose rows are sorted by length together: more would save little padding and mix less."""


def length_grouped_batches(
    lengths: Tensor, batch_size: int, generator: torch.Generator, window_batches: int = WINDOW_BATCHES
) -> list[list[int]]:
    """Batches of rows of similar length, in random order: shuffle, sort inside windows, cut, shuffle the batches.

    Every row is in one batch; all batches but one are full. A pure function of its arguments.

    Args:
        lengths: ``[N]`` int64 tokens of each row.
        batch_size: Rows a batch.
        generator: Of the order.
        window_batches: Batches in a window.

    Returns:
        Positions of the rows of each batch.

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
