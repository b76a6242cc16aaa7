"""Clipping and noise multipliers against laws of the Gaussian mechanism."""

from __future__ import annotations

import math

import pytest

from fellrec.functional.privacy import next_bound, update_multiplier


@pytest.mark.parametrize(("multiplier", "count_std"), [(1.0, 5.0), (3.0, 3.0), (0.4, 100.0)])
def test_the_two_releases_cost_what_the_budget_says(multiplier: float, count_std: float) -> None:
    """Rényi divergences of Gaussians add up: α / (2 a²) + α / (2 b²) = α / (2 z²), with b = 2 count_std."""
    of_updates = update_multiplier(multiplier, count_std)
    assert of_updates**-2 + (2 * count_std) ** -2 == pytest.approx(multiplier**-2, rel=1e-12)


def test_a_count_that_costs_more_than_the_budget_leaves_nothing_for_the_updates() -> None:
    assert update_multiplier(1.0, 0.5) == math.inf


def test_the_norm_falls_by_the_paper_s_factor_where_all_updates_are_within_it() -> None:
    assert next_bound(2.0, 1.0, 0.5, 0.2) == pytest.approx(2 * math.exp(-0.1))
