"""What a run cost, and a comparison over cuts: files, JSON, MLflow and the printed tables tell the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.planning.plan import Planner

FOUR_LAYERS = ["backbone.num_layers=4"]


def store(folder: Path) -> str:
    """By its full path: MLflow keeps a store open that it knows by another folder's relative path."""
    return f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> tuple[Path, dict[str, Any]]:
    """FedAvg over two cuts, executed or not."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        sweep = ["aggregation=fedavg", "split.head_layers=1,2", "split.transport=none,inprocess"]
        main(["compare", *tiny_overrides, *FOUR_LAYERS, *sweep, "run_dir=cuts", store(folder)])
    return folder, json.loads((folder / "cuts" / "comparison" / "comparison.json").read_text())


def test_every_cut_has_its_own_line_and_directory_and_the_same_figures(swept: tuple[Path, dict[str, Any]]) -> None:
    folder, comparison = swept
    lines = {name: line for name, line in comparison["rules"].items() if line["kind"] == "learned"}
    variants = [f"head_layers={k} transport={how}" for k in (1, 2) for how in ("none", "inprocess")]
    assert list(lines) == [f"fedavg {variant}" for variant in variants]
    for variant in variants:
        assert (folder / "cuts" / f"fedavg-{variant.replace(' ', '-')}-s0" / "results.json").is_file()
    means = [line["mean"] for line in lines.values()]
    assert all(mean == means[0] for mean in means), "split and unsplit runs are the same run"


@pytest.mark.parametrize("head_layers", [1, 2])
def test_storage_and_traffic_are_those_of_plan_and_of_the_ledger(
    swept: tuple[Path, dict[str, Any]], tiny_overrides: list[str], head_layers: int
) -> None:
    """Planned from the configuration alone, and summed from the run's own ledger."""
    folder, comparison = swept
    for how in ("none", "inprocess"):
        (run,) = comparison["rules"][f"fedavg head_layers={head_layers} transport={how}"]["runs"]
        where = [f"split.head_layers={head_layers}", "aggregation=fedavg"]
        plan = Planner().plan(compose([*tiny_overrides, *FOUR_LAYERS, *where]))
        cost = run["cost"]
        assert cost["client_weight_bytes"] == plan.client.weight_bytes
        assert cost["server_weight_bytes"] == plan.server.weight_bytes
        name = f"fedavg-head_layers={head_layers}-transport={how}-s0"
        ledger = pd.read_csv(folder / "cuts" / name / "ledger.csv")
        rounds = ledger[ledger["phase"] == "train"]
        assert cost["round_bytes"] == rounds["bytes"].sum() / 2
        if how == "inprocess":
            assert cost["round_bytes"] == pytest.approx(plan.round_bytes, rel=1e-12)
            assert 0 < cost["measured"]["server_busy_rate"] < 1
        else:
            assert set(cost["train_bytes"]) == {"adapter", "scalar"}
            assert cost["measured"]["server_busy_rate"] is None


def test_the_comparison_over_cuts_is_written_drawn_and_logged(swept: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = swept
    table = pd.read_csv(folder / "cuts" / "comparison" / "cost.csv")
    assert table["rule"].tolist()[0] == "FedAvg head_layers=1 transport=none"
    assert matplotlib.image.imread(folder / "cuts" / "comparison" / "cost.png").std() > 0.02
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fellrec")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags.get("kind") == "comparison"]
    (cut,) = [run for run in runs if run.data.tags.get("variant") == "head_layers=2 transport=inprocess"]
    line = table[table["rule"] == "FedAvg head_layers=2 transport=inprocess"].iloc[0]
    assert {"train/cost/client/weight_bytes", "train/cost/round_bytes", "train/cost/server/busy_rate"} <= set(
        cut.data.metrics
    )
    assert parent.data.metrics == {}, "MLflow would draw a bar of its own for each"
    assert f"{line['NDCG@10']:.4f}" in parent.data.tags["mlflow.note.content"]


def test_a_run_through_the_cut_ends_with_its_cost(
    tmp_path: Path,
    tiny_overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The head is frozen, so no gradient is sent to the client."""
    monkeypatch.chdir(tmp_path)
    frozen = ["split=executed", "adapter=lora", "adapter.layers=body+tail", "trainer.local_epochs=2"]
    main(["train", *tiny_overrides, *FOUR_LAYERS, *frozen, "run_dir=run", "tracking.metrics=all", store(tmp_path)])
    shown = capsys.readouterr().out
    for text in ("bytes of a round", "hidden states", "weights: client", "server "):
        assert text in shown
    cost = json.loads((tmp_path / "run" / "results.json").read_text())["cost"]
    measured = cost["measured"]
    assert len(measured["round_seconds"]) == 2
    assert 0 < measured["sums"]["server/busy_seconds"] <= measured["sums"]["client/waited_seconds"]
    rates = measured["server_busy_rate"] + measured["client_busy_rate"]
    assert rates <= 1 + 1e-9, "in one process they take turns"
    assert cost["train_bytes"]["gradient"]["down"] == 0 < cost["train_bytes"]["gradient"]["up"]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fellrec")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    busy = client.get_metric_history(run.info.run_id, "train/cost/server/busy_seconds")
    assert [point.step for point in busy] == [0, 1]
    assert sum(point.value for point in busy) == pytest.approx(measured["sums"]["server/busy_seconds"])
    assert {f"train/cost/{name}" for name in ("client/busy_seconds", "client/peak_bytes", "server/busy_rate")} <= set(
        run.data.metrics
    )


def test_a_comparison_needs_no_more_than_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["compare", "split.transport=distributed"])
    assert "split.transport=distributed is not allowed, only none or inprocess" in capsys.readouterr().err
