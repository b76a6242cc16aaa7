import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fellrec.functional.balance import STATISTICS, balance, mean_gain

metric_vectors = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12)


@given(metric_vectors)
def test_statistics_equal_their_definitions(values):
    """Each definition in NumPy, over pairs of clients or fractions of the sum."""
    x = np.array(values, dtype=np.float64)
    result = balance(torch.tensor(values, dtype=torch.float64))
    assert result["variance"] == pytest.approx(np.var(x), abs=1e-12)
    assert result["std"] == pytest.approx(np.std(x), abs=1e-9)
    assert result["worst"] == x.min()
    assert result["gap"] == np.ptp(x)
    assert result["worst_10_percent"] == pytest.approx(np.sort(x)[: math.ceil(len(x) / 10)].mean())
    if x.max() > 1e-30:
        fractions = x / x.sum()
        assert result["coefficient_of_variation"] == pytest.approx(np.std(x) / np.mean(x), abs=1e-6)
        assert result["gini"] == pytest.approx(np.abs(fractions[:, None] - fractions).sum() / (2 * len(x)), abs=1e-9)
        assert result["jain"] == pytest.approx(1 / (len(x) * (fractions**2).sum()))
        positive = fractions[fractions > 0]
        expected = -(positive * np.log(positive)).sum() / np.log(len(x)) if len(x) > 1 else 1.0
        assert result["entropy"] == pytest.approx(expected, abs=1e-9)


@given(metric_vectors, st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(values, random):
    shuffled = random.sample(values, len(values))
    assert balance(torch.tensor(values)) == pytest.approx(balance(torch.tensor(shuffled)), abs=1e-12)


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [0.25, 0.25, 0.25], [0.5]])
def test_equal_values_are_perfectly_balanced(values):
    result = balance(torch.tensor(values))
    for name in ("variance", "std", "coefficient_of_variation", "gap", "gini"):
        assert result[name] == pytest.approx(0, abs=1e-12), name
    assert (result["jain"], result["entropy"]) == pytest.approx((1, 1))
    assert result["worst"] == values[0]


def test_no_client_gives_nan():
    assert set(balance(torch.empty(0))) == set(STATISTICS)
    assert all(math.isnan(value) for value in balance(torch.empty(0)).values())


def test_worst_10_percent_has_no_floating_point_error():
    assert balance(torch.arange(30.0))["worst_10_percent"] == 1.0  # mean of 0, 1, 2; 0.1 * 30 is 3.0000000000000004


def test_mean_gain_leaves_out_clients_without_users():
    assert mean_gain(torch.tensor([0.5, math.nan, 0.25]), torch.tensor([0.25, 0.5, 0.0])) == 0.25
