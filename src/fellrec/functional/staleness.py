"""How much less an update counts that was made from an earlier version of the model."""

from __future__ import annotations

import torch
from torch import Tensor


def constant(staleness: Tensor) -> Tensor:
    """1, whatever the staleness.

    Example:
        >>> constant(torch.tensor([0, 7])).tolist()
        [1.0, 1.0]
    """
    return torch.ones_like(staleness, dtype=torch.float64)


def polynomial(staleness: Tensor, exponent: float) -> Tensor:
    """``(1 + d)^(-exponent)``; with exponent 1/2 that of FedBuff.

    Args:
        staleness: ``[N]`` d, versions of the model since each client received its start.
        exponent: At least 0.

    Returns:
        ``[N]`` float64 in (0, 1].

    Example:
        >>> polynomial(torch.tensor([0, 3]), 0.5).tolist()
        [1.0, 0.5]
    """
    return (1 + staleness.double()) ** -exponent


def hinge(staleness: Tensor, slope: float, tolerance: int) -> Tensor:
    """1 up to ``d = tolerance``, then ``1 / (slope · (d − tolerance) + 1)``.

    Args:
        staleness: ``[N]`` d.
        slope: At least 0.
        tolerance: At least 0.

    Returns:
        ``[N]`` float64 in (0, 1].

    Example:
        >>> hinge(torch.tensor([0, 4, 5]), slope=1.0, tolerance=4).tolist()
        [1.0, 1.0, 0.5]
    """
    return 1 / (slope * (staleness.double() - tolerance).clamp(min=0) + 1)
