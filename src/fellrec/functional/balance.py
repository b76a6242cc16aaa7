"""Statistics of the distribution of a metric over clients. All functions take ``[C]`` values, one per client.

Values are finite and not negative (a metric in [0, 1]). A vector of zeros counts as perfectly balanced; an empty vector
gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def variance(values: Tensor) -> float:
    """Population variance (divided by C).

    Example:
        >>> variance(torch.tensor([1.0, 3.0]))
        1.0
    """
    wide = values.double()
    return float(((wide - wide.mean()) ** 2).mean())


def std(values: Tensor) -> float:
    """Population standard deviation.

    Example:
        >>> std(torch.tensor([1.0, 5.0]))
        2.0
    """
    return math.sqrt(variance(values))


def coefficient_of_variation(values: Tensor) -> float:
    """Population standard deviation divided by the mean; 0 if the mean is 0.

    Example:
        >>> coefficient_of_variation(torch.tensor([1.0, 3.0]))
        0.5
    """
    mean = float(values.double().mean())
    return std(values) / mean if mean != 0 else 0.0


def worst(values: Tensor) -> float:
    """Minimum.

    Example:
        >>> worst(torch.tensor([0.5, 0.25]))
        0.25
    """
    return float(values.min()) if len(values) else math.nan


def worst_10_percent(values: Tensor) -> float:
    """Mean of the lowest ``ceil(0.1 C)`` values, at least one.

    Example:
        >>> worst_10_percent(torch.arange(1.0, 12.0))
        1.5
    """
    count = -(-len(values) // 10)  # integer ceil: math.ceil(0.1 * 30) is 4
    return float(values.double().sort().values[:count].mean())


def gap(values: Tensor) -> float:
    """Maximum minus minimum.

    Example:
        >>> gap(torch.tensor([0.5, 0.25, 0.75]))
        0.5
    """
    return float(values.double().max() - values.double().min()) if len(values) else math.nan


def gini(values: Tensor) -> float:
    """Gini coefficient: 0 for equal values, ``1 - 1/C`` if only one value is not zero.

    It is the mean absolute difference of all pairs of clients divided by twice the mean.

    Example:
        >>> gini(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        0.75
    """
    if not len(values):
        return math.nan
    fractions = _fractions(values)
    ranks = torch.arange(1, len(fractions) + 1, dtype=torch.float64, device=fractions.device)
    # Sorted ascending, the value of rank i is added i - 1 times and subtracted C - i times over all pairs.
    return float(((2 * ranks - len(fractions) - 1) * fractions.sort().values).sum() / len(fractions))


def jain(values: Tensor) -> float:
    """Jain's fairness index ``(sum x)^2 / (C sum x^2)``: 1 for equal values, ``1/C`` if only one is not zero.

    Example:
        >>> jain(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        0.25
    """
    fractions = _fractions(values)
    return float(1 / (len(fractions) * (fractions**2).sum())) if len(fractions) else math.nan


def entropy(values: Tensor) -> float:
    """Normalised entropy of the values' fractions of their sum, divided by its maximum ``log C``.

    1 for equal values and for a single client, 0 if only one of several values is not zero.

    Example:
        >>> entropy(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        0.5
    """
    fractions = _fractions(values)
    if len(fractions) < 2:
        return 1.0 if len(fractions) else math.nan
    return float(torch.special.entr(fractions).sum() / math.log(len(fractions)))


STATISTICS: dict[str, Callable[[Tensor], float]] = {
    function.__name__: function
    for function in (variance, std, coefficient_of_variation, worst, worst_10_percent, gap, gini, jain, entropy)
}
"""Balance statistics of METHOD section 5 by name."""


def balance(values: Tensor) -> dict[str, float]:
    """Compute all of `STATISTICS`.

    Args:
        values: ``[C]`` finite values, one per client.

    Example:
        >>> list(balance(torch.tensor([1.0, 3.0])))[:3], balance(torch.zeros(3))["jain"]
        (['variance', 'std', 'coefficient_of_variation'], 1.0)
    """
    return {name: function(values) for name, function in STATISTICS.items()}


def mean_gain(values: Tensor, baseline: Tensor) -> float:
    """Mean difference of the clients' values to a baseline, such as local training.

    Args:
        values: ``[C]`` values.
        baseline: ``[C]`` values of the same clients under the baseline. Clients with NaN in either are left out.

    Example:
        >>> mean_gain(torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.75]))
        0.25
    """
    differences = values.double() - baseline.double()
    return float(differences[~differences.isnan()].mean())


def _fractions(values: Tensor) -> Tensor:
    """``[C]`` float64 fractions of the sum; equal fractions for a vector of zeros."""
    wide = values.double()
    total = wide.sum()
    return wide / total if total > 0 else torch.full_like(wide, 1 / max(len(wide), 1))
