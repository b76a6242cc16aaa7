"""``fellrec report`` on a real comparison: from its folder, and from MLflow by id and by a search."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from mlflow.tracking import MlflowClient

from fellrec.cli.main import main


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str], empty_store: Path) -> Path:
    """A folder with a comparison of two rules in ``runs`` and its report, tracked in ``mlflow.db``."""
    folder = tmp_path_factory.mktemp("reports")
    shutil.copy(empty_store, folder / "mlflow.db")
    overrides = ["aggregation=fedavg,fellrec", "references.show=[popularity]", f"run_dir={folder / 'runs'}"]
    main(["compare", *tiny_overrides, *overrides, store(folder), "trainer.num_rounds=1"])
    main(["report", str(folder / "runs")])
    return folder


def store(folder: Path) -> str:
    return f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["report", *words])
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_the_page_shows_the_results_of_the_runs(place: Path) -> None:
    text = (place / "runs" / "report" / "report.html").read_text()
    for rule in ("fedavg", "fellrec"):
        found = json.loads((place / "runs" / f"{rule}-s0" / "results.json").read_text())
        for name in ("ndcg_at_10/mean", "ndcg_at_10/std", "ndcg_at_10/worst", "recall_at_10/mean"):
            assert f">{found['summary'][name]:.4f}<" in text
        for value in found["per_client"]["ndcg_at_10"]:
            assert f">{value:.4f}<" in text
    popularity = json.loads((place / "runs" / "comparison" / "comparison.json").read_text())["rules"]["popularity"]
    assert f">{popularity['mean']['ndcg_at_10/mean']:.4f}<" in text
    assert "mixing × N, round 0" in text
    for heading in ("Mean against spread", "Traffic and cost", "Settings that differ"):
        assert f">{heading}</h2>" in text


def test_the_same_comparison_is_found_in_mlflow(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = MlflowClient(tracking_uri=f"sqlite:///{place / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fellrec")
    assert experiment is not None
    runs = {run.data.tags.get("rule") or "": run for run in client.search_runs([experiment.experiment_id])}
    parent = next(run for run in runs.values() if run.data.tags.get("kind") == "comparison")
    main(["report", parent.info.run_id, store(place), "--output", str(place / "by_id")])
    main(["report", "tags.rule = 'fedavg'", store(place), "--output", str(place / "by_search")])
    numbers = [pd.read_csv(place / name / "tables" / "results.csv") for name in ("runs/report", "by_id", "by_search")]
    pd.testing.assert_frame_equal(numbers[0], numbers[1])
    assert numbers[2]["rule"].tolist() == ["fedavg"]
    assert numbers[2]["ndcg_at_10_mean"].tolist() == numbers[0]["ndcg_at_10_mean"].tolist()[:1]

    output = ["--output", str(place / "none"), store(place)]
    assert f"has no run {'0' * 32}" in refused(["0" * 32, *output], capsys)
    assert "fits \"tags.rule = 'krum'\"" in refused(["tags.rule = 'krum'", *output], capsys)
    assert "is not a search expression of MLflow" in refused(["rule == nonsense ==", *output], capsys)
    assert "has no experiment other" in refused(["tags.rule = 'krum'", "tracking.experiment=other", *output], capsys)
    fellrec = runs["fellrec"].info
    for status in ("RUNNING", "FAILED"):
        client.update_run(fellrec.run_id, status=status)
        message = refused([parent.info.run_id, *output], capsys)
        assert f"({fellrec.run_id}, {status})" in message
        assert "not finished" in message
    assert not (place / "none").exists()


def test_a_store_that_is_away_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["0" * 32, "tracking.uri=http://127.0.0.1:9", "--output", str(place / "none")]
    assert "tracking.uri=http://127.0.0.1:9 cannot be used" in refused(words, capsys)
