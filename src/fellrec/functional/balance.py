"""How evenly a metric is spread over clients. All functions take ``[C]`` values, one per client.

Values are finite and not negative (a metric in [0, 1]); a vector of zeros counts as perfectly balanced; a vector
without clients gives NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def variance(values: Tensor) -> float:
    """Population variance: the clients are all there are, not a sample of more.

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
    """Standard deviation over mean; 0 for zeros.

    Example:
        >>> coefficient_of_variation(torch.tensor([1.0, 3.0]))
        0.5
    """
    mean = float(values.double().mean())
    return std(values) / mean if mean != 0 else 0.0


def worst(values: Tensor) -> float:
    """The lowest value.

    Example:
        >>> worst(torch.tensor([0.5, 0.25]))
        0.25
    """
    return float(values.min()) if len(values) else math.nan


def worst_10_percent(values: Tensor) -> float:
    """Mean of the lowest ``ceil(0.1 C)`` values: at least one client, whatever C is.

    Example:
        >>> worst_10_percent(torch.arange(1.0, 12.0))
        1.5
    """
    count = -(-len(values) // 10)  # ceil in integers: 0.1 * 30 in floats would give 4
    return float(values.double().sort().values[:count].mean())


def gap(values: Tensor) -> float:
    """Best minus worst value.

    Example:
        >>> gap(torch.tensor([0.5, 0.25, 0.75]))
        0.5
    """
    return float(values.double().max() - values.double().min()) if len(values) else math.nan


def gini(values: Tensor) -> float:
    """Gini coefficient: 0 is even, ``1 - 1/C`` is one client for all.

    It is the mean absolute difference of all pairs of clients over twice the mean.

    Example:
        >>> gini(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        0.75
    """
    if not len(values):
        return math.nan
    shares = _shares(values)
    ranks = torch.arange(1, len(shares) + 1, dtype=torch.float64, device=shares.device)
    # Sorted ascending, the value of rank i is added i - 1 times and subtracted C - i times over all pairs.
    return float(((2 * ranks - len(shares) - 1) * shares.sort().values).sum() / len(shares))


def jain(values: Tensor) -> float:
    """Jain's fairness index ``(sum x)^2 / (C sum x^2)``: 1 is even, ``1/C`` is one client for all.

    Example:
        >>> jain(torch.tensor([0.0, 0.0, 0.0, 1.0]))
        0.25
    """
    shares = _shares(values)
    return float(1 / (len(shares) * (shares**2).sum())) if len(shares) else math.nan


def entropy(values: Tensor) -> float:
    """Entropy of the shares over its maximum ``log C``: 1 is even, and a single client; 0 is one client for all.

    Example:
        >>> entropy(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        0.5
    """
    shares = _shares(values)
    if len(shares) < 2:
        return 1.0 if len(shares) else math.nan
    return float(torch.special.entr(shares).sum() / math.log(len(shares)))


STATISTICS: dict[str, Callable[[Tensor], float]] = {
    function.__name__: function
    for function in (variance, std, coefficient_of_variation, worst, worst_10_percent, gap, gini, jain, entropy)
}
"""All balance statistics of METHOD section 5 by name."""


def balance(values: Tensor) -> dict[str, float]:
    """All of `STATISTICS`.

    Args:
        values: ``[C]`` finite values, one per client.

    Example:
        >>> list(balance(torch.tensor([1.0, 3.0])))[:3], balance(torch.zeros(3))["jain"]
        (['variance', 'std', 'coefficient_of_variation'], 1.0)
    """
    return {name: function(values) for name, function in STATISTICS.items()}


def gain(values: Tensor, baseline: Tensor) -> dict[str, float]:
    """What each client wins over another rule, as a rule over local-only training.

    Args:
        values: ``[C]`` values of the rule that is judged.
        baseline: ``[C]`` values of the same clients under the other rule. Clients that are NaN in either are left out.

    Returns:
        ``gain_mean`` and ``gain_min`` (absolute differences, not ratios) and ``num_clients_losing``.

    Example:
        >>> gain(torch.tensor([0.5, 0.75]), torch.tensor([0.25, 1.0]))
        {'gain_mean': 0.0, 'gain_min': -0.25, 'num_clients_losing': 1.0}
    """
    differences = values.double() - baseline.double()
    differences = differences[~differences.isnan()]
    return {
        "gain_mean": float(differences.mean()),
        "gain_min": worst(differences),
        "num_clients_losing": float((differences < 0).sum()),
    }


def _shares(values: Tensor) -> Tensor:
    """``[C]`` float64 shares of the total, even for a vector of zeros."""
    wide = values.double()
    total = wide.sum()
    return wide / total if total > 0 else torch.full_like(wide, 1 / max(len(wide), 1))
