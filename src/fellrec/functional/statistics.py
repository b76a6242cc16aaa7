"""How sure a difference is: paired bootstrap, Wilcoxon's signed-rank test, Holm's correction.

Most take differences of pairs, one row per unit that is resampled or ranked (a user, or a client).
"""

from __future__ import annotations

import math

import torch
from scipy import stats
from torch import Tensor

from fellrec.errors import ConfigError

NUM_RESAMPLES = 10_000
"""Resamples of a bootstrap."""

NUM_RESAMPLES_OF_SPREAD = 2_000
"""The same for a spread, whose resamples cost more."""

MIN_UNITS = 6
"""With fewer pairs no test of their signs can tell a difference from none at the 5 % level: if all n differences point
the same way, its two-sided p is ``2 / 2**n``, which is 0.0625 for five. An interval from them would claim too much."""

_BLOCK = 1 << 22
"""Random numbers that are drawn at once."""


def bootstrap_intervals(
    differences: Tensor, seed: int, num_resamples: int = NUM_RESAMPLES, level: float = 0.95
) -> Tensor:
    """Percentile intervals of mean differences (Efron and Tibshirani 1993, chapter 13).

    Units are drawn with replacement; all columns of a unit come together, so the columns share their resamples.

    Args:
        differences: ``[n, M]`` differences of pairs, one row per unit and one column per comparison.
        seed: Of the draws. They follow the order of the rows: sort the units for a result that does not depend on it.
        num_resamples: How often.
        level: Probability that an interval should have, in (0, 1).

    Returns:
        ``[M, 2]`` float64 lower and upper ends; NaN if there are fewer than `MIN_UNITS` units.

    Raises:
        ConfigError: If ``num_resamples`` is below 1 or ``level`` is not between 0 and 1.

    Example:
        >>> bootstrap_intervals(torch.ones(8, 1), seed=0)  # all units agree
        tensor([[1., 1.]], dtype=torch.float64)
        >>> bootstrap_intervals(torch.tensor([[1.0], [2.0], [3.0]]), seed=0)  # too few
        tensor([[nan, nan]], dtype=torch.float64)
    """
    _check(num_resamples, level)
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
    """Basic interval of the difference of two coefficients of variation over clients (Davison and Hinkley 1997, 5.2.1).

    Each client's users are drawn with replacement, as many as it has; a user's two values come together. Few users make
    clients look less alike than they are, and resamples do so again: the basic interval ``2 · found - quantile`` takes
    this bias away, percentiles would double it.

    Args:
        values: ``[n, 2]``, a user's metric under two rules.
        clients: ``[n]`` integers, whose the users are.
        seed: Of the draws; they follow the order of the rows within a client.
        num_resamples: How often.
        level: Probability that the interval should have, in (0, 1).

    Returns:
        Lower and upper end for the first rule's minus the second's; NaN if there is one client, or one that has fewer
        than `MIN_UNITS` users.

    Raises:
        ConfigError: If ``num_resamples`` is below 1 or ``level`` is not between 0 and 1.

    Example:
        >>> values = torch.tensor([[1.0, 2.0], [3.0, 2.0]]).repeat_interleave(6, dim=0)  # nothing varies in a client
        >>> spread_interval(values, torch.arange(2).repeat_interleave(6), seed=0)
        (0.5, 0.5)
    """
    _check(num_resamples, level)
    _, owner, sizes = clients.cpu().unique(return_inverse=True, return_counts=True)
    if len(sizes) < 2 or int(sizes.min()) < MIN_UNITS:
        return math.nan, math.nan
    order = owner.argsort(stable=True)
    owner, ordered = owner[order], values.cpu().double()[order]
    first, generator = sizes.cumsum(0) - sizes, torch.Generator().manual_seed(seed)

    def difference(drawn: Tensor) -> Tensor:
        sums = torch.zeros(len(drawn), len(sizes), 2, dtype=torch.float64).index_add_(1, owner, ordered[drawn])
        means = sums / sizes[:, None]
        spread = means.std(dim=1, correction=0) / means.mean(dim=1)
        first_rule, second_rule = spread.nan_to_num(0.0).unbind(dim=1)  # of zeros it is 0, as in functional.balance
        return first_rule - second_rule

    found, block = [], max(1, _BLOCK // len(owner))
    for start in range(0, num_resamples, block):
        uniform = torch.rand(min(block, num_resamples - start), len(owner), generator=generator, dtype=torch.float64)
        found.append(difference(first[owner] + (uniform * sizes[owner]).long()))
    tail = (1 - level) / 2
    ends = torch.cat(found).quantile(torch.tensor([1 - tail, tail], dtype=torch.float64))
    low, high = (2 * difference(torch.arange(len(owner))[None]) - ends).tolist()
    return low, high


def _check(num_resamples: int, level: float) -> None:
    if num_resamples < 1:
        raise ConfigError(f"num_resamples is {num_resamples!r}; allowed are integers from 1")
    if not 0 < level < 1:
        raise ConfigError(f"level is {level!r}; allowed are numbers between 0 and 1")


def wilcoxon_p(differences: Tensor) -> float:
    """Two-sided p of Wilcoxon's signed-rank test (1945): are differences as often and as much above 0 as below?

    Pairs without a difference are left out, as Wilcoxon did; ties get mean ranks.

    Args:
        differences: ``[n]`` differences of pairs.

    Returns:
        In [0, 1]; 1 if no pair differs, NaN if there is no pair.

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
    return float(stats.wilcoxon(differences.cpu().double().numpy(), zero_method="wilcox").pvalue)


def holm(p_values: Tensor) -> Tensor:
    """Adjust p for how many tests there are (Holm 1979): the chance of one false alarm among all stays below it.

    The smallest of m is multiplied by m, the next by m - 1 and so on; none may become smaller than the one before it.

    Args:
        p_values: ``[m]`` p of all tests, none NaN.

    Returns:
        ``[m]`` float64 adjusted p, in the same order, at most 1.

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
    """Change against a baseline in per cent; NaN if the baseline is 0.

    Example:
        >>> round(relative_change(0.12, 0.08), 6)
        50.0
    """
    return 100 * (value / baseline - 1) if baseline else math.nan
