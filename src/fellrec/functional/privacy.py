"""Clipping and Gaussian noise of differential privacy, without randomness of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor


def norm_of(update: Mapping[str, Tensor]) -> float:
    """L2 norm over all entries of all parameters, computed in float64.

    Example:
        >>> import torch
        >>> norm_of({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
        5.0
    """
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in update.values()))


def clip_factor(norm: float, bound: float) -> float:
    """``min(1, bound / norm)``, what an update of this norm is multiplied by; 1 for norm 0.

    Example:
        >>> clip_factor(4.0, 1.0), clip_factor(0.5, 1.0), clip_factor(0.0, 1.0)
        (0.25, 1.0, 1.0)
    """
    return min(1.0, bound / norm) if norm > 0 else 1.0


def next_bound(bound: float, within: float, quantile: float, rate: float) -> float:
    """``bound · exp(-rate (within - quantile))``: the clipping norm of the next round (Andrew et al. 2021, section 2).

    Args:
        bound: Clipping norm of the round.
        within: Fraction of the clients whose update was within it; below 0 or above 1 if noise was added.
        quantile: Fraction that should be.
        rate: η_C of the paper.

    Example:
        >>> next_bound(1.0, 0.5, 0.5, 0.2)
        1.0
    """
    return bound * math.exp(-rate * (within - quantile))


def update_multiplier(multiplier: float, count_std: float) -> float:
    """Noise multiplier of the sum of updates that, released with a noised count, costs as much as ``multiplier`` alone.

    A count of the clients within the norm, each as ±1/2, has a noise multiplier of ``2 count_std``. Two Gaussian
    releases with multipliers a and b cost what one with ``(a⁻² + b⁻²)^(-1/2)`` does (Andrew et al. 2021, theorem 1).

    Args:
        multiplier: Of both releases together.
        count_std: Standard deviation of the count's noise.

    Returns:
        The multiplier of the updates; infinite if the count alone costs more.

    Example:
        >>> round(update_multiplier(1.0, 5.0), 4)
        1.005
    """
    left = multiplier**-2 - (2 * count_std) ** -2
    return left**-0.5 if left > 0 else math.inf
