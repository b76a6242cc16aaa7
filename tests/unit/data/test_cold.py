"""Cold items and users of a data set of six items and five users, counted by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from fellrec.data.cold import ColdStart
from fellrec.data.prepared import PreparedData
from fellrec.data.ragged import Ragged
from fellrec.data.schema import Catalogue
from fellrec.metrics import ClientRankingMetrics


@pytest.fixture(scope="module")
def data() -> PreparedData:
    """User 4 is public, so item 3, which only this user has, is cold. Items 4 and 5 have no interactions."""
    train = Ragged.from_rows([[0, 1, 2], [0, 1], [2], [], [3, 3, 0]])
    valid = Ragged.from_rows([[1], [3], [0], [2], []])
    test = Ragged.from_rows([[4, 0], [1], [2], [3], []])
    return PreparedData(
        name="films",
        catalogue=Catalogue(tuple("abcdef"), tuple("ABCDEF"), pd.DataFrame(index=range(6))),
        users=pd.DataFrame({"user_id": list("uvwxy")}),
        histories=train.join(valid).join(test),
        train=train,
        valid=valid,
        test=test,
        train_targets=np.zeros(len(train.values), dtype=bool),
        client_of_user=np.array([0, 0, 1, 1, -1]),
        num_clients=2,
        max_history=10,
        key="",
    )


def test_cold_items_and_users(data: PreparedData) -> None:
    cold = ColdStart.of(data, 2)
    assert cold.items.tolist() == [False, False, False, True, True, True]
    assert cold.users.tolist() == [False, False, True, True, False]
    assert cold.counts(np.array([0, 1, 2, 3])) == {"items": 3, "users": 2, "users_below": 2}
    assert cold.counts(np.array([0, 1, 3]))["users"] == 1, "user 2 is not evaluated"
    assert ColdStart.of(data, 4).users.tolist() == [True, True, True, True, False], "public users do not count"


def test_users_with_a_cold_target(data: PreparedData) -> None:
    groups = ColdStart.of(data, 2).groups(data)
    assert groups["val"]["cold_items"].tolist() == [False, True, False, False, False]
    assert groups["test"]["cold_items"].tolist() == [True, False, False, True, False]


def test_group_metrics_are_in_the_summary(data: PreparedData) -> None:
    """Ranks 0, 1, 2 and 9 with cutoff 2: users 0 and 1 have a hit."""
    metric = ClientRankingMetrics(2, (2,), ColdStart.of(data, 2).groups(data))
    metric.update(torch.tensor([3, 1, 0, 2]), torch.tensor([1, 0, 0, 1]), torch.tensor([9, 1, 0, 2]), torch.arange(4))
    summary = metric.evaluation("test", 0).summary
    assert summary["cold_items/num_users"] == 2
    assert summary["cold_items/hr_at_2/pooled"] == 0.5, "users 0 and 3"
    assert summary["cold_users/hr_at_2/pooled"] == 0.0, "users 2 and 3"
    assert summary["hr_at_2/pooled"] == 0.5


def test_an_empty_group_has_only_its_number_of_users(data: PreparedData) -> None:
    metric = ClientRankingMetrics(2, (2,), ColdStart.of(data, 1).groups(data))
    metric.update(torch.tensor([2]), torch.tensor([1]), torch.tensor([0]), torch.tensor([0]))
    cold = {name: value for name, value in metric.evaluation("val", 0).summary.items() if name.startswith("cold")}
    assert cold == {"cold_items/num_users": 0.0, "cold_users/num_users": 0.0}
