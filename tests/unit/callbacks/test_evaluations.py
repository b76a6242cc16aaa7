"""The table of all evaluations of a run, also of one that was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from fellrec.callbacks.evaluations import Evaluations
from fellrec.federated.records import FitStart
from fellrec.metrics.summary import summarise
from fellrec.types import Evaluation

DONE: Any = SimpleNamespace()


def evaluation(stage: str, round_index: int, values: tuple[float, float, float, float]) -> Evaluation:
    """Two clients with two users each."""
    return summarise({"hr_at_1": torch.tensor(values)}, torch.tensor([0, 0, 1, 1]), 2, stage, round_index)


def test_the_table_has_every_figure(tmp_path: Path) -> None:
    """Clients have 0.5 and 1: mean 0.75, variance 1/16, the worst 0.5; four users are pooled to 0.75."""
    table = Evaluations(tmp_path)
    table.on_fit_start(FitStart(1, 0, 2))
    table.on_evaluate_end(evaluation("test", 3, (0.0, 1.0, 1.0, 1.0)))
    table.on_fit_end(DONE)
    found = pd.read_csv(tmp_path / "evaluations.csv").set_index("metric")
    row = found.loc["hr_at_1"]
    assert [row[name] for name in ("stage", "round", "mean", "pooled", "variance", "std", "worst", "gap")] == [
        *("test", 3, 0.75, 0.75, 0.0625, 0.25, 0.5, 0.5)
    ]
    assert found.loc["num_users", "value"] == 4
    shown = json.loads((tmp_path / "evaluations.json").read_text())
    assert shown["columns"][:4] == ["stage", "round", "metric", "mean"]
    assert len(shown["data"]) == len(found) == 3


@pytest.mark.parametrize("rounds_done", [0, 1, 2])
def test_a_resumed_run_has_the_table_of_an_uninterrupted_one(tmp_path: Path, rounds_done: int) -> None:
    """The first process stops after round 1, in the middle of a row; the second begins at one of the rounds."""
    evaluations = [evaluation("val", number, (0.0, 1.0, number / 4, 1.0)) for number in (-1, 0, 1, 2)]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder, count in ((whole, 4), (stopped, 3)):
        folder.mkdir()
        table = Evaluations(folder)
        table.on_fit_start(FitStart(3, 0, 2))
        for one in evaluations[:count]:
            table.on_evaluate_end(one)
    with (stopped / "evaluations.csv").open("a") as file:
        file.write("val,2,hr_at")
    table = Evaluations(stopped)
    table.on_fit_start(FitStart(3, rounds_done, 2))
    for one in evaluations[0 if rounds_done == 0 else rounds_done + 1 :]:
        table.on_evaluate_end(one)
    assert (stopped / "evaluations.csv").read_text() == (whole / "evaluations.csv").read_text()
