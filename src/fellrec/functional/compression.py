"""Lossy encodings of tensors: levels of 8 or 4 bits, and the largest entries."""

from __future__ import annotations

import torch
from torch import Tensor


def levels(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The nearest of ``2 ** bits - 1`` equally spaced levels, symmetric about 0.

    Args:
        values: Floats of any shape.
        bits: 2 to 8.

    Returns:
        Levels, int8 of the same shape, and the distance of two levels, a float32 ``[1]``: their product is within half
        a distance of ``values``. For zeros the distance is 0.

    Example:
        >>> found, step = levels(torch.tensor([-1.0, 0.1, 1.0]), bits=4)
        >>> found.tolist(), round(float(step), 4)
        ([-7, 1, 7], 0.1429)
    """
    top = 2 ** (bits - 1) - 1
    largest = values.abs().amax() if values.numel() else values.new_zeros(())
    step = (largest.double() / top).float().reshape(1)
    if not bool(step > 0):  # zeros, or so small that float32 has no such distance
        return torch.zeros_like(values, dtype=torch.int8), torch.zeros(1)
    return (values.double() / step.double()).round().clamp(-top, top).to(torch.int8), step


def pack(nibbles: Tensor) -> Tensor:
    """Two values of -8 to 7 in each byte.

    Args:
        nibbles: int8 of any shape.

    Returns:
        uint8 ``[ceil(numel / 2)]``.

    Example:
        >>> pack(torch.tensor([1, -1, 7], dtype=torch.int8)).tolist()
        [241, 7]
    """
    flat = nibbles.flatten().to(torch.int16) & 15
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[::2] | flat[1::2] << 4).to(torch.uint8)


def unpack(packed: Tensor, numel: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: uint8 ``[ceil(numel / 2)]``.
        numel: How many values there are.

    Returns:
        int8 ``[numel]``.

    Example:
        >>> unpack(torch.tensor([241, 7], dtype=torch.uint8), 3).tolist()
        [1, -1, 7]
    """
    wide = packed.to(torch.int16)
    nibbles = torch.stack([wide & 15, wide >> 4], dim=1).flatten()[:numel]
    return torch.where(nibbles > 7, nibbles - 16, nibbles).to(torch.int8)


def largest(values: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """The entries with the largest absolute values.

    Args:
        values: Of any shape, not empty.
        fraction: Of the entries, in (0, 1]; at least one is taken.

    Returns:
        Entries ``[K]`` and their places in the flattened tensor, ascending, int32 ``[K]`` (int64 for more than 2³¹).

    Example:
        >>> largest(torch.tensor([[1.0, -3.0], [2.0, 0.0]]), 0.5)
        (tensor([-3.,  2.]), tensor([1, 2], dtype=torch.int32))
    """
    flat = values.flatten()
    count = max(1, round(fraction * flat.numel()))
    places = flat.abs().topk(count).indices.sort().values
    return flat[places], places if flat.numel() > 2**31 else places.int()
