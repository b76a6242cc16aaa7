"""Batches of training rows of similar length."""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW_BATCHES = 50
"""Number of batches whose rows are sorted by length together. Larger windows save little padding and shuffle less."""


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
