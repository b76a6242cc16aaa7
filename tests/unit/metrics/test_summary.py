import math

import pytest
import torch

from fellrec.functional.balance import STATISTICS
from fellrec.metrics import client_means, summarise


def test_mean_counts_clients_and_pooled_counts_users():
    """Three users of client 0 have 1, 1, 0 and one of client 2 has 0: mean (2/3 + 0) / 2, pooled 2/4."""
    evaluation = summarise({"hr_at_5": torch.tensor([1.0, 1.0, 0.0, 0.0])}, torch.tensor([0, 0, 0, 2]), 3, "test", 7)
    summary = evaluation.summary
    assert summary["hr_at_5/mean"] == pytest.approx(1 / 3)
    assert summary["hr_at_5/pooled"] == 0.5
    assert summary["hr_at_5/worst"] == 0
    assert summary["hr_at_5/variance"] == pytest.approx(1 / 9)  # of 2/3 and 0; the client without users is no 0
    assert summary["num_users"] == 4
    assert summary["num_clients_without_users"] == 1
    assert evaluation.per_client["hr_at_5"][1].isnan()
    figures = {name.partition("/")[2] for name in summary if "/" in name}
    assert figures == {"mean", "pooled", *STATISTICS}


def test_without_users_everything_is_nan():
    summary = summarise({"hr_at_5": torch.empty(0)}, torch.empty(0).long(), 2, "val", -1).summary
    assert summary["num_clients_without_users"] == 2
    assert all(math.isnan(value) for name, value in summary.items() if "/" in name)


def test_client_means_are_float64_of_float32_values():
    values = torch.full((3,), 0.1)
    assert client_means(values, torch.zeros(3).long(), 1).item() == pytest.approx(values[0].double().item(), rel=1e-15)
