"""Statistics of paired differences: bootstrap intervals, Wilcoxon's signed-rank test, Holm's correction.

Differences have one row per unit (a user or a client).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NUM_RESAMPLES = 10_000
"""Number of bootstrap resamples."""

NUM_RESAMPLES_OF_SPREAD = 2_000
"""Number of bootstrap resamples of `spread_interval`, which are more expensive."""

MIN_UNITS = 6
"""Minimum number of pairs. With n pairs the smallest two-sided p of a sign test is ``2 / 2**n``, which is 0.0625 for
five: no difference is significant at the 5 % level, and an interval would be too narrow."""

_BLOCK = 1 << 22
"""Maximum number of random numbers in memory at the same time."""


def bootstrap_intervals(
    differences: Tensor, seed: int, num_resamples: int = NUM_RESAMPLES, level: float = 0.95
) -> Tensor:
    """Bootstrap percentile intervals of mean differences (Efron and Tibshirani 1993, chapter 13).

    Units are resampled with replacement, with the same resamples for all columns.

    Args:
        differences: ``[n, M]`` differences of pairs, one row per unit and one column per comparison.
        seed: Seed of the resamples. The result depends on the order of the rows, so sort the units.
        num_resamples: Number of resamples, at least 1.
        level: Confidence level, in (0, 1).

    Returns:
        ``[M, 2]`` float64 lower and upper ends; NaN if there are fewer than `MIN_UNITS` units.

    Example:
        >>> bootstrap_intervals(torch.ones(8, 1), seed=0)  # all units agree
        tensor([[1., 1.]], dtype=torch.float64)
        >>> bootstrap_intervals(torch.tensor([[1.0], [2.0], [3.0]]), seed=0)  # too few
        tensor([[nan, nan]], dtype=torch.float64)
    """
    num_units, num_columns = differences.shape
    if num_units < MIN_UNITS:
        return torch.full((num_columns, 2), math.nan, dtype=torch.float64)
    values, generator = differences.cpu().double(), torch.Generator().manual_seed(seed)
    means, block = [], max(1, _BLOCK // num_units)
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        drawn = torch.randint(num_units, (size, num_units), generator=generator)
        cells = drawn + num_units * torch.arange(size)[:, None]
        counts = torch.bincount(cells.view(-1), minlength=size * num_units).view(size, num_units)
        means.append(counts.double() @ values / num_units)
    tail = (1 - level) / 2
    return torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0).T


def spread_interval(
    values: Tensor,
    clients: Tensor,
    seed: int,
    num_resamples: int = NUM_RESAMPLES_OF_SPREAD,
    level: float = 0.95,
) -> tuple[float, float]:
    """Basic bootstrap interval of the difference of two coefficients of variation over clients.

    Each client's users are resampled with replacement, in pairs. The variation of the means within clients increases
    the coefficient of variation, and resampling increases it again. The basic interval ``2 · estimate - quantile``
    (Davison and Hinkley 1997, 5.2.1) removes this bias, while a percentile interval would double it.

    Args:
        values: ``[n, 2]`` metric of each user under two rules.
        clients: ``[n]`` integers, client of each user.
        seed: Seed of the resamples. The result depends on the order of the rows within a client.
        num_resamples: Number of resamples, at least 1.
        level: Confidence level, in (0, 1).

    Returns:
        Lower and upper end for the first rule minus the second. NaN if there is only one client, or a client with
        fewer than `MIN_UNITS` users.

    Example:
        >>> values = torch.tensor([[1.0, 2.0], [3.0, 2.0]]).repeat_interleave(6, dim=0)  # constant within clients
        >>> spread_interval(values, torch.arange(2).repeat_interleave(6), seed=0)
        (0.5, 0.5)
    """
    _, owner, sizes = clients.cpu().unique(return_inverse=True, return_counts=True)
    if len(sizes) < 2 or int(sizes.min()) < MIN_UNITS:
        return math.nan, math.nan
    order = owner.argsort(stable=True)
    owner, ordered = owner[order], values.cpu().double()[order]
    first, generator = sizes.cumsum(0) - sizes, torch.Generator().manual_seed(seed)

    def difference(drawn: Tensor) -> Tensor:
        """Difference of the two rules' spreads for each resample, ``[R]``."""
        sums = torch.zeros(len(drawn), len(sizes), 2, dtype=torch.float64).index_add_(1, owner, ordered[drawn])
        means = sums / sizes[:, None]
        spread = means.std(dim=1, correction=0) / means.mean(dim=1)
        first_rule, second_rule = spread.nan_to_num(0.0).unbind(dim=1)  # 0 if the mean is 0, as in functional.balance
        return first_rule - second_rule

    found, block = [], max(1, _BLOCK // len(owner))
    for start in range(0, num_resamples, block):
        uniform = torch.rand(min(block, num_resamples - start), len(owner), generator=generator, dtype=torch.float64)
        found.append(difference(first[owner] + (uniform * sizes[owner]).long()))
    tail = (1 - level) / 2
    ends = torch.cat(found).quantile(torch.tensor([1 - tail, tail], dtype=torch.float64))
    low, high = (2 * difference(torch.arange(len(owner))[None]) - ends).tolist()
    return low, high


def wilcoxon_p(differences: Tensor) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test (1945) for differences that are symmetric around 0.

    Zero differences are left out, as in Wilcoxon's definition; ties get mean ranks.

    Args:
        differences: ``[n]`` differences of pairs.

    Returns:
        p-value in [0, 1]; 1 if all differences are 0, NaN if there are none.

    Example:
        >>> wilcoxon_p(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))  # 2 of 2**6 patterns of signs are as extreme
        0.03125
        >>> wilcoxon_p(torch.zeros(9))
        1.0
    """
    if not len(differences):
        return math.nan
    if not differences.any():
        return 1.0
    from scipy import stats

    return float(stats.wilcoxon(differences.cpu().double().numpy(), zero_method="wilcox").pvalue)


def holm(p_values: Tensor) -> Tensor:
    """Adjust p-values for multiple tests (Holm 1979); controls the family-wise error rate.

    The smallest of m p-values is multiplied by m, the next by m - 1 and so on; the results are made monotone.

    Args:
        p_values: ``[m]`` p-values of all tests, none NaN.

    Returns:
        ``[m]`` float64 adjusted p-values, in the same order, at most 1.

    Example:
        >>> holm(torch.tensor([0.01, 0.04, 0.03])).numpy().round(4).tolist()
        [0.03, 0.06, 0.06]
    """
    ordered, order = p_values.double().sort(stable=True)
    factors = torch.arange(len(ordered), 0, -1, dtype=torch.float64)
    adjusted = torch.empty_like(ordered)
    adjusted[order] = (ordered * factors).cummax(0).values.clamp_max(1.0) if len(ordered) else ordered
    return adjusted


def relative_change(value: float, baseline: float) -> float:
    """Relative change to a baseline in per cent; NaN if the baseline is 0.

    Example:
        >>> round(relative_change(0.12, 0.08), 6)
        50.0
    """
    return 100 * (value / baseline - 1) if baseline else math.nan
