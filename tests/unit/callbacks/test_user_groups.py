"""Metrics of user groups at each client, by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fellrec.callbacks.user_groups import UserGroups, group_labels
from fellrec.data.prepared import PreparedData
from fellrec.data.ragged import Ragged
from fellrec.errors import ConfigError
from fellrec.metrics import summarise

CONFIG: Any = SimpleNamespace(trainer=SimpleNamespace(metric="ndcg_at_10"))


class Log:
    """Keeps what is logged."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.metrics = run_dir, dict[str, float]()

    def log_metrics(self, metrics: dict[str, float], step: int, once: str) -> None:
        self.metrics |= metrics

    def log_artifact(self, path: Path) -> None:
        assert path.is_file()


@pytest.fixture
def data() -> PreparedData:
    """Eight users of two clients with 1 to 8 training interactions, and a public one with 100."""
    lengths = np.array([1, 2, 3, 4, 5, 6, 7, 8, 100])
    train = Ragged.from_rows([[0] * count for count in lengths])
    users = pd.DataFrame({"user_id": [str(n) for n in range(9)], "gender": ["F", "M"] * 4 + ["M"]})
    users.loc[3, "gender"] = None
    empty: Any = None
    return PreparedData(
        *("films", empty, users, train, train, train, train, np.ones(1, dtype=bool)),
        client_of_user=np.array([0, 1] * 4 + [-1]),
        num_clients=2,
        max_history=5,
        key="",
    )


def test_quartiles_are_of_the_clients_users(data: PreparedData) -> None:
    assert group_labels(data, "activity").tolist() == [*("q1", "q1", "q2", "q2", "q3", "q3", "q4", "q4"), ""]
    assert group_labels(data, "gender").tolist() == ["F", "M", "F", "", "F", "M", "F", "M", ""]


def test_users_with_equally_many_interactions_are_in_one_group(data: PreparedData) -> None:
    same = replace(data, train=Ragged.from_rows([[0, 0]] * 9))
    assert set(group_labels(same, "activity")) == {"q1", ""}


def test_cells_and_their_spread(data: PreparedData, tmp_path: Path) -> None:
    """Women are all at client 0; of the men at client 1 three have a known gender."""
    values = torch.tensor([0.1, 0.2, 0.3, 0.9, 0.5, 0.6, 0.7, 0.4]).double()
    users = torch.arange(8)
    evaluation = summarise({"ndcg_at_10": values}, users % 2, 2, "test", 3, users)
    log: Any = Log(tmp_path)
    UserGroups(log, data, CONFIG, ["activity", "gender"], least_users=3).on_fit_end(
        SimpleNamespace(evaluation=evaluation, best_round=3)  # type: ignore[arg-type]
    )
    table = pd.read_csv(tmp_path / "user_groups.csv")
    gender = table[table["by"] == "gender"]
    assert gender[["group", "client", "users"]].to_numpy().tolist() == [["F", 0, 4], ["M", 1, 3]]
    assert gender["ndcg_at_10"].tolist() == pytest.approx([0.4, 0.4])
    activity = table[table["by"] == "activity"]
    assert len(activity) == 8, "one user in each quartile at each client"
    assert log.metrics["test/groups/activity/ndcg_at_10/num_cells"] == 0
    assert log.metrics["test/groups/gender/ndcg_at_10/num_cells"] == 2
    assert log.metrics["test/groups/gender/ndcg_at_10/std"] == pytest.approx(0, abs=1e-7)
    assert log.metrics["test/groups/gender/ndcg_at_10/worst"] == pytest.approx(0.4)


def test_an_unknown_attribute_is_refused(data: PreparedData, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown user attribute in callbacks.user_groups.columns 'gendr'; choose from: gender"
    ):
        UserGroups(Log(tmp_path), data, CONFIG, ["gendr"])  # type: ignore[arg-type]
