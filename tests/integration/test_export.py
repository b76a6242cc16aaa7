"""What a run leaves of single users: another library's metrics of the exported files are the logged ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fellrec.cli.main import main
from fellrec.errors import DataError
from fellrec.report.export import export, strictly_descending

NAMES = {"ndcg_at_10": "ndcg@10", "recall_at_10": "recall@10", "mrr_at_10": "mrr@10", "hr_at_10": "hit_rate@10"}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """A run with items that no client trains on, and a bound below which some users are cold."""
    folder = tmp_path_factory.mktemp("exported")
    sizes = ["data.reader.num_items=150", "trainer.cold_users_below=6", "trainer.num_rounds=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["train", *tiny_overrides, *sizes, "aggregation=fedavg", "run_dir=run"])
    return folder / "run"


@pytest.fixture(scope="module")
def summary(run_dir: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run_dir / "results.json").read_text())["summary"]
    return found


@pytest.mark.parametrize(("tool", "suffix"), [("ranx", "json"), ("trec", "trec")])
def test_ranx_finds_the_logged_figures(
    run_dir: Path, summary: dict[str, float], tmp_path: Path, tool: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from ranx import Qrels, Run, evaluate

    main(["export", str(run_dir), "--format", tool, "--output", str(tmp_path / "out")])
    assert f"{int(summary['num_users'])} users; for 0 of them" in capsys.readouterr().out
    run, qrels = (kind.from_file(str(tmp_path / "out" / f"{name}.{suffix}")) for kind, name in _files(Run, Qrels))
    found = evaluate(qrels, run, list(NAMES.values()))
    for ours, theirs in NAMES.items():
        assert found[theirs] == pytest.approx(summary[f"{ours}/pooled"], abs=1e-6), ours
    assert found["ndcg@10"] > 0.01


def _files(run: type, qrels: type) -> list[tuple[type, str]]:
    return [(run, "run"), (qrels, "qrels")]


def test_recboles_formulas_find_the_logged_figures(run_dir: Path, summary: dict[str, float]) -> None:
    """RecBole's ``TopkMetric``: hits ``[U, K]`` and numbers of positives ``[U]`` are split from ``rec.topk``.

    Recall is the cumulated hits by the positives; NDCG divides by the gain of ``min(positives, k)`` hits at the top;
    MRR is one over the place of the first hit.
    """
    main(["export", str(run_dir), "--format", "recbole"])
    with np.load(run_dir / "export" / "recbole" / "recbole.npz", allow_pickle=False) as arrays:
        topk, items, item_ids, user_ids = (arrays[name] for name in ("rec_topk", "rec_items", "item_ids", "user_ids"))
    hits, positives = topk[:, :-1][:, :10].astype(bool), topk[:, -1]
    assert topk.shape == (int(summary["num_users"]), 51)
    discounts = 1 / np.log2(np.arange(10) + 2)
    ideal = discounts.cumsum()[np.minimum(positives, 10) - 1]
    first = np.where(hits.any(axis=1), 1 / (hits.argmax(axis=1) + 1), 0)
    expected = {
        "ndcg_at_10": ((hits * discounts).sum(axis=1) / ideal).mean(),
        "recall_at_10": (hits.sum(axis=1) / positives).mean(),
        "mrr_at_10": first.mean(),
        "hr_at_10": hits.any(axis=1).mean(),
    }
    for name, value in expected.items():
        assert value == pytest.approx(summary[f"{name}/pooled"], abs=1e-9), name
    rankings = pd.read_parquet(run_dir / "rankings.parquet")
    one = rankings[rankings["user_id"] == user_ids[3]]
    assert item_ids[items[3][items[3] > 0]].tolist() == one["item_id"].tolist()


def test_the_files_of_single_users_agree(run_dir: Path, summary: dict[str, float]) -> None:
    rankings, targets, users = (
        pd.read_parquet(run_dir / f"{name}.parquet") for name in ("rankings", "targets", "users")
    )
    assert list(rankings.columns) == ["user_id", "client", "rank", "item_id", "score"]
    assert users["user_id"].is_unique
    assert set(rankings["user_id"]) == set(targets["user_id"]) == set(users["user_id"])
    assert (rankings.groupby("user_id")["rank"].agg(["min", "max", "count"]) == [0, 49, 50]).all(axis=None)
    assert not rankings.duplicated(["user_id", "item_id"]).any()
    steps = rankings.groupby("user_id")["score"].diff().dropna()
    assert (steps <= 0).all()
    partition = pd.read_parquet(run_dir / "partition.parquet").set_index("user_id")["client"]
    assert (partition[users["user_id"]].to_numpy() == users["client"].to_numpy()).all()
    listed = rankings.merge(targets, on=["user_id", "item_id"])
    found = listed[listed["rank"] < 10].groupby("user_id").size().reindex(users["user_id"], fill_value=0) > 0
    assert found.mean() == pytest.approx(summary["hr_at_10/pooled"])


def test_cold_items_and_users_are_reported(run_dir: Path, summary: dict[str, float]) -> None:
    results, users = json.loads((run_dir / "results.json").read_text()), pd.read_parquet(run_dir / "users.parquet")
    assert results["cold"]["users_below"] == 6
    assert results["cold"]["items"] > 0
    assert results["num_tied_users"] == users["is_tied"].sum()
    assert ((users["train_interactions"] < 6) == users["is_cold"]).all()
    for group, flag in (("cold_items", "has_cold_target"), ("cold_users", "is_cold")):
        inside = users[users[flag]]
        assert summary[f"{group}/num_users"] == len(inside) > 0
        assert summary[f"{group}/ndcg_at_10/pooled"] == pytest.approx(inside["ndcg_at_10"].mean())


def test_tied_scores_become_distinct_and_nothing_else_changes() -> None:
    generator = np.random.default_rng(0)
    scores = -np.sort(-generator.integers(-3, 4, (40, 50)).astype(np.float32), axis=1)
    ranks = np.tile(np.arange(50), 40)
    found = strictly_descending(scores.ravel(), ranks).reshape(40, 50)
    assert (np.diff(found, axis=1) < 0).all()
    assert (found.astype(np.float32) == scores).all()
    distinct = -np.sort(-generator.normal(size=50).astype(np.float32))
    assert (strictly_descending(distinct, np.arange(50)) == distinct).all()


def test_what_cannot_be_exported_is_refused(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["export", str(tmp_path), "--format", "ranx"])
    assert done.value.code == 1
    assert "has no rankings.parquet; give the directory of a run" in capsys.readouterr().err
    frames = {name: pd.read_parquet(run_dir / f"{name}.parquet") for name in ("rankings", "targets")}
    for name, frame in frames.items():
        frame["item_id"] = "an item"
        frame.to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match="item_id 'an item' is empty or contains white space"):
        export(tmp_path, "trec", tmp_path / "out")
