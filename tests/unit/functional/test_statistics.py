"""Intervals, tests and corrections against other libraries, closed forms and synthetic data."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fellrec.functional.statistics import MIN_UNITS, bootstrap_intervals, holm, spread_interval, wilcoxon_p


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_interval_equals_that_of_scipy() -> None:
    """Both are random: the standard deviation of an end is about that of a normal quantile, sqrt(.025 * .975 / R) /
    pdf(1.96) = 0.027 standard errors for R = 10,000; two of them differ by less than 5 * sqrt(2) times that."""
    first, second = noise(150).exp(), noise(150, seed=1).exp()

    def mean_difference(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
        return np.mean(x, axis=axis) - np.mean(y, axis=axis)

    expected = stats.bootstrap(
        (first.numpy(), second.numpy()),
        mean_difference,
        paired=True,
        method="percentile",
        n_resamples=10_000,
        rng=np.random.default_rng(3),
    )
    (found,) = bootstrap_intervals((first - second)[:, None], seed=0).tolist()
    interval = expected.confidence_interval
    assert found == pytest.approx([interval.low, interval.high], abs=0.2 * expected.standard_error)


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_with_many_units_the_interval_is_the_normal_one(level: float) -> None:
    values = 0.1 + noise(5000)
    (found,) = bootstrap_intervals(values[:, None], seed=0, level=level).tolist()
    mean, error = float(values.mean()), float(values.std(correction=0)) / 5000**0.5
    reach = float(stats.norm.ppf((1 + level) / 2)) * error
    assert found == pytest.approx([mean - reach, mean + reach], abs=0.15 * error)


def test_the_interval_covers_the_true_mean_at_the_nominal_rate() -> None:
    """600 data sets, one per column; the coverage has a standard deviation of sqrt(.95 * .05 / 600) = 0.009."""
    low, high = bootstrap_intervals(0.3 + noise(80, 600), seed=0, num_resamples=2000).T
    assert 0.915 < float(((low < 0.3) & (high > 0.3)).double().mean()) < 0.975
    assert float(((low < 0.0) & (high > 0.0)).double().mean()) < 0.35, "0 is 2.7 standard errors away"


def test_the_interval_is_determined_by_the_seed() -> None:
    values = noise(30, 1)
    assert torch.equal(bootstrap_intervals(values, seed=4), bootstrap_intervals(values, seed=4))
    assert not torch.equal(bootstrap_intervals(values, seed=4), bootstrap_intervals(values, seed=5))


def test_columns_are_independent() -> None:
    values = noise(40, 3)
    alone = torch.cat([bootstrap_intervals(values[:, [column]], seed=1) for column in range(3)])
    torch.testing.assert_close(bootstrap_intervals(values, seed=1), alone, rtol=1e-12, atol=1e-12)


def test_too_few_units_have_no_interval() -> None:
    """With n differences of the same sign, Wilcoxon's exact two-sided p is 2 / 2**n: 1/16 for n = 5."""
    too_few, enough = (wilcoxon_p(torch.arange(1.0, num_units + 1)) for num_units in (MIN_UNITS - 1, MIN_UNITS))
    assert (too_few, enough) == pytest.approx((2 / 2 ** (MIN_UNITS - 1), 2 / 2**MIN_UNITS))
    assert enough < 0.05 < too_few
    assert bootstrap_intervals(noise(MIN_UNITS - 1, 2), seed=0).isnan().all()
    assert bootstrap_intervals(noise(MIN_UNITS, 2), seed=0).isfinite().all()


def test_wilcoxon_has_its_nominal_level_and_detects_a_difference() -> None:
    """Under the null p is uniform: of 400, about 20 are below 0.05, with a standard deviation of 4.4."""
    null = [wilcoxon_p(noise(60, seed=seed)) for seed in range(400)]
    assert 5 <= sum(p < 0.05 for p in null) <= 36
    assert wilcoxon_p(0.5 + noise(200)) < 1e-6
    assert math.isnan(wilcoxon_p(torch.empty(0)))


def test_zero_differences_are_left_out() -> None:
    values = torch.cat([torch.zeros(500), 0.5 + noise(80)])
    assert wilcoxon_p(values) == pytest.approx(wilcoxon_p(values[500:]), rel=1e-9)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """Marcus, Peritz and Gabriel (1976): the adjusted p of a test is the largest Bonferroni p of any set with it."""
    tests = range(len(p_values))
    sets = [chosen for size in range(1, len(p_values) + 1) for chosen in combinations(tests, size)]
    bonferroni = {chosen: min(1.0, len(chosen) * min(p_values[test] for test in chosen)) for chosen in sets}
    expected = [max(p for chosen, p in bonferroni.items() if test in chosen) for test in tests]
    assert holm(torch.tensor(p_values, dtype=torch.float64)).tolist() == pytest.approx(expected, abs=1e-12)


def test_holm_of_no_tests_is_empty() -> None:
    assert holm(torch.empty(0)).tolist() == []


def spread_of(values: np.ndarray, clients: np.ndarray) -> float:
    means = np.array([values[clients == client].mean() for client in np.unique(clients)])
    return float(means.std() / means.mean())


def test_the_interval_of_spreads_equals_a_loop_over_clients() -> None:
    """The expected interval has 4,000 resamples, drawn client by client; tolerances as above."""
    clients = np.repeat([4, 1, 9], [40, 25, 60])
    values = np.stack([noise(125).exp().numpy() + clients / 4, noise(125, seed=1).exp().numpy() + 1], axis=1)
    draws = np.random.default_rng(0)
    found = []
    for _ in range(4_000):
        drawn = np.concatenate([draws.choice(np.flatnonzero(clients == c), (clients == c).sum()) for c in (1, 4, 9)])
        found.append(spread_of(values[drawn, 0], clients[drawn]) - spread_of(values[drawn, 1], clients[drawn]))
    here = spread_of(values[:, 0], clients) - spread_of(values[:, 1], clients)
    low, high = np.quantile(found, [0.025, 0.975])
    interval = spread_interval(torch.from_numpy(values), torch.from_numpy(clients), seed=0)
    assert interval == pytest.approx([2 * here - high, 2 * here - low], abs=0.3 * float(np.std(found)))


def test_the_interval_of_spreads_covers_the_true_difference_at_the_nominal_rate() -> None:
    """Known means of five clients: spreads 0.471 and 0.236. The coverage over 400 data sets has a standard deviation
    of 1.1 %."""
    means = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [2.0, 1.5], [2.5, 1.5]], dtype=torch.float64)
    truth = float((means.std(dim=0, correction=0) / means.mean(dim=0)).diff())
    clients = torch.arange(5).repeat_interleave(60)
    covered = [
        low < -truth < high
        for seed in range(400)
        for low, high in [spread_interval(means[clients] + noise(300, 2, seed=seed), clients, seed, num_resamples=400)]
    ]
    assert 0.9 < sum(covered) / 400 < 0.99


def test_one_client_or_too_few_users_have_no_interval_of_spreads() -> None:
    values = noise(40, 2).exp()
    assert all(math.isnan(end) for end in spread_interval(values, torch.zeros(40), seed=0))
    few = torch.arange(40) // 8
    assert not any(math.isnan(end) for end in spread_interval(values, few, seed=0))
    few[:3] = 1  # client 0 has five users
    assert all(math.isnan(end) for end in spread_interval(values, few, seed=0))
    assert spread_interval(torch.zeros(40, 2), torch.arange(40) // 8, seed=0) == (0, 0), "all metrics are 0"
