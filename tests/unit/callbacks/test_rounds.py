"""The table of rounds: by hand, and the same after a stop anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pandas as pd
import pytest
import torch

from fellrec.callbacks.rounds import FILE, RoundTable
from fellrec.federated.records import NOTHING, Aggregated, FitStart, Job, RoundRecord, Trained
from fellrec.metrics.summary import summarise
from fellrec.types import Evaluation

MIXING = torch.tensor([[0.75, 0.25], [0.5, 0.5]])


class Log:
    """Where the files of a run are."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir


def evaluation(round_index: int) -> Evaluation:
    names = ("ndcg_at_5", "recall_at_5", "hr_at_5", "mrr_at_5", "ndcg_at_10")
    values = torch.tensor([0.1, 0.3, 0.5 + round_index / 10])
    return summarise(dict.fromkeys(names, values), torch.tensor([0, 0, 1]), 2, "val", round_index)


def trained(row: int, data_of: int | None, loss: float) -> Trained:
    return Trained(Job(row, data_of, 0, 0, NOTHING), NOTHING, NOTHING, loss, 10 + row, 3, 0.5)


def record(round_index: int, *rows: Trained, is_evaluated: bool = True, **found: Any) -> RoundRecord:
    clients = tuple(item.row for item in rows)
    validated = evaluation(round_index) if is_evaluated else None
    return RoundRecord(round_index, rows, Aggregated({}, **found), validated, 1.0, clients=clients)


def table(run_dir: Path) -> RoundTable:
    return RoundTable(cast(Any, Log(run_dir)), "ndcg_at_5")


def write(callback: RoundTable, first: int = 0, last: int = 3) -> None:
    callback.on_fit_start(FitStart(3, first, 2))
    if first == 0:
        callback.on_evaluate_end(evaluation(-1))
    for number in range(first, last):
        both = trained(0, 0, 2.0 - number), trained(1, 1, 1.0)
        callback.on_round_end(record(number, *both, is_evaluated=number != 1, matrices={"mixing": MIXING}))


def test_a_round_by_hand(tmp_path: Path) -> None:
    """The client's means are 0.2 and 0.5; 1 / (0.75² + 0.25²) = 1.6 senders."""
    write(table(tmp_path))
    found = pd.read_csv(tmp_path / FILE)
    assert len(found) == 2 * 4
    first = found[found["round"] == 0].to_dict("records")
    assert [row["client"] for row in first] == [0, 1]
    assert [(row["loss"], row["steps"], row["seconds"], row["train_targets"]) for row in first] == [
        (2.0, 3, 0.5, 10),
        (1.0, 3, 0.5, 11),
    ]
    assert [row["own_weight"] for row in first] == [0.75, 0.5]
    assert [row["effective_senders"] for row in first] == pytest.approx([1.6, 2.0])
    assert [row["val_ndcg_at_5"] for row in first] == pytest.approx([0.2, 0.5])
    assert "val_ndcg_at_10" not in found
    assert found.loc[found["round"] == -1, "loss"].isna().all(), "nobody has trained"
    assert found.loc[found["round"] == 1, "val_hr_at_5"].isna().all(), "the round was not evaluated"


def test_a_rule_with_one_model_a_personal_model_and_pooled_data(tmp_path: Path) -> None:
    callback = table(tmp_path)
    callback.on_fit_start(FitStart(3, 0, 2))
    weights = {"update_weight": torch.tensor([0.25, 0.75])}
    callback.on_round_end(
        RoundRecord(
            0,
            (trained(0, 0, 1.0), trained(1, 1, 1.0), trained(2, 0, 4.0)),
            Aggregated({}, per_client=weights),
            evaluation(0),
            1.0,
            clients=(0, 1),
        )
    )
    callback.on_round_end(record(1, trained(0, None, 1.0)))
    found = pd.read_csv(tmp_path / FILE)
    own = found[found["is_personal"] == 0]
    assert own["own_weight"].tolist()[:2] == [0.25, 0.75]
    assert own["effective_senders"].tolist()[:2] == pytest.approx([1.6, 1.6])
    assert found[found["is_personal"] == 1][["client", "loss"]].values.tolist() == [[0, 4.0]]
    assert found[found["is_personal"] == 1]["val_ndcg_at_5"].isna().all()
    pooled = found[found["round"] == 1]
    assert pooled["client"].isna().tolist() == [True, False, False], "the data of all, then each client's metrics"


@pytest.mark.parametrize("done", [0, 1, 2])
def test_a_stop_leaves_no_trace(done: int, tmp_path: Path) -> None:
    """Also in the middle of a line, of a round whose number begins like another's."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    write(table(whole))
    write(table(cut), 0, done + 1)
    with (cut / FILE).open("a") as file:
        file.write("1")
    write(table(cut), done)
    assert (cut / FILE).read_text() == (whole / FILE).read_text()
