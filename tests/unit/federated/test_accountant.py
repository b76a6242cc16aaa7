"""ε against independent formulas: the exact Gaussian mechanism, and Rényi divergences computed here.

Balle and Wang (ICML 2018, theorem 8): the Gaussian mechanism with sensitivity 1 and standard deviation σ is (ε, δ)-DP if
and only if Φ(1/(2σ) - εσ) - e^ε Φ(-1/(2σ) - εσ) ≤ δ.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import comb, logsumexp
from scipy.stats import norm

from fellrec.errors import ConfigError
from fellrec.federated.accountant import Sampling

DELTA = 1e-5


def gaussian_delta(epsilon: float, std: float) -> float:
    return float(norm.cdf(0.5 / std - epsilon * std) - np.exp(epsilon) * norm.cdf(-0.5 / std - epsilon * std))


def poisson_epsilon(rate: float, multiplier: float, num_rounds: int, delta: float) -> float:
    """Mironov, Talwar and Zhang 2019, for whole orders: E[((1-q) + q e^{(2x-1)/(2σ²)})^α] term by term.

    Converted by ε = rdp + log((α-1)/α) - (log δ + log α)/(α-1) (Canonne, Kamath and Steinke 2020, proposition 12).
    """
    found = []
    for order in range(2, 65):
        k = np.arange(order + 1)
        terms = np.log(comb(order, k)) + (order - k) * math.log1p(-rate) + k * math.log(rate)
        terms = terms + (k * k - k) / (2 * multiplier**2)
        rdp = num_rounds * float(logsumexp(terms)) / (order - 1)
        found.append(rdp + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1))
    return min(found)


@pytest.mark.parametrize("multiplier", [0.5, 1.0, 4.0])
def test_one_round_of_all_clients_is_the_exact_gaussian_mechanism(multiplier: float) -> None:
    found = Sampling("all", 10, 10).epsilon(multiplier, 1, DELTA)
    expected = brentq(lambda epsilon: gaussian_delta(epsilon, multiplier) - DELTA, 0, 100)
    assert found == pytest.approx(expected, rel=1e-6)


def test_rounds_of_all_clients_are_one_round_with_less_noise() -> None:
    """N Gaussian releases of one vector are one with the standard deviation σ / √n: their mean is sufficient."""
    sampling = Sampling("all", 10, 10)
    assert sampling.epsilon(6.0, 9, DELTA) == pytest.approx(sampling.epsilon(2.0, 1, DELTA), rel=1e-9)
    assert sampling.epsilon(6.0, 0, DELTA) == 0


@pytest.mark.parametrize(("rate", "multiplier", "num_rounds"), [(0.1, 1.0, 100), (0.5, 3.0, 20)])
def test_poisson_sampling_is_the_formula_of_its_paper(rate: float, multiplier: float, num_rounds: int) -> None:
    found = Sampling("poisson", 1000, round(1000 * rate)).epsilon(multiplier, num_rounds, DELTA)
    expected = poisson_epsilon(rate, multiplier, num_rounds, 0.99 * DELTA)
    assert expected <= found * (1 + 1e-9)  # the accountant has fewer orders
    assert found == pytest.approx(expected, rel=0.02)


def test_a_cohort_of_fixed_size_costs_more_than_poisson_and_at_most_what_all_clients_would() -> None:
    """Its neighbours differ by a replacement: the sum moves by 2 C, so the same noise protects half as well."""
    multiplier, num_rounds = 4.0, 5
    fixed = Sampling("fixed", 50, 5).epsilon(multiplier, num_rounds, DELTA)
    poisson = Sampling("poisson", 50, 5).epsilon(multiplier, num_rounds, DELTA)
    unsampled = Sampling("all", 50, 50).epsilon(multiplier / 2, num_rounds, DELTA)
    assert poisson < fixed < 1.1 * unsampled


@pytest.mark.parametrize("sampling", [Sampling("all", 10, 10), Sampling("poisson", 500, 100)])
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_the_noise_that_is_found_keeps_the_budget_and_is_hardly_more_than_needed(
    sampling: Sampling, epsilon: float
) -> None:
    multiplier = sampling.multiplier(epsilon, 10, DELTA)
    assert sampling.epsilon(multiplier, 10, DELTA) <= epsilon * (1 + 1e-9)
    assert sampling.epsilon(multiplier - 0.003, 10, DELTA) > epsilon


def test_a_budget_without_protection_needs_hardly_any_noise() -> None:
    assert Sampling("poisson", 5000, 2500).multiplier(400.0, 10, DELTA) < 0.5


def test_rounds_without_clients_are_counted_in_delta() -> None:
    with pytest.raises(ConfigError, match=r"24 clients, of whom 12 are expected, a round of 2 has none with"):
        Sampling("poisson", 24, 12).multiplier(8.0, 2, DELTA)
    Sampling("poisson", 60, 30).check_empty(1.0, 10, DELTA)  # 10 · 2⁻⁶⁰ e < 10⁻⁷
    with pytest.raises(ConfigError, match="raise participation.rate"):
        Sampling("poisson", 60, 30, dropout=0.9).check_empty(1.0, 10, DELTA)
