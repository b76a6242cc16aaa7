"""Whole runs through the command line on a small synthetic set, and what they leave in the run directory and MLflow."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf
from preloaded import Preloaded, python

from fellrec.aggregation.settings import TITLES
from fellrec.cli.main import main
from fellrec.config.stored import read_config
from fellrec.experiment.build import build_data
from fellrec.models.backbone import load_hf


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tracked(workplace: Path, empty_store: Path) -> Path:
    """A workplace with a database."""
    shutil.copy(empty_store, workplace / "mlflow.db")
    return workplace


def client_of(folder: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")


def runs_of(folder: Path) -> list[Any]:
    client = client_of(folder)
    experiment = client.get_experiment_by_name("fellrec")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> tuple[Path, str]:
    """One FELLRec run and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    code, shown = python(["-m", "fellrec", "train", *tiny_overrides, "run_dir=run"], folder)
    assert code == 0, shown
    return folder, shown


def test_a_run_ends_with_a_table_and_says_where_it_lies(finished: tuple[Path, str]) -> None:
    folder, shown = finished
    for name in ("FELLRec", "random", "popularity", "Markov", "Markov, decayed", "pretrained base", "NDCG@10", "worst"):
        assert name in shown
    first = shown.index("FELLRec on synthetic: 3 clients, 72 users, 60 items; 2 rounds\n")
    assert re.match(
        r".*\nbackbone tiny: all [\d,]+ parameters are trained\ninput of a user: \d+ tokens on average, at most \d+\n"
        r"training: about \d+ s \(\d+ steps of [\d.e-]+ s\); evaluations come on top\n",
        shown[first:],
    )
    assert "round 2/2, train loss " in shown
    assert ", val NDCG@10 " in shown
    assert not {"\x1b[1m", "\x1b[3m"} & set(re.findall("\x1b\\[\\d+m", shown)), (
        "plain text, because the output is not a terminal"
    )
    assert f"Run directory: {folder / 'run'}" in shown
    assert "fellrec ui" in shown


def test_the_run_directory_is_complete(finished: tuple[Path, str]) -> None:
    run = finished[0] / "run"
    names = {path.name for path in run.iterdir()}
    assert names >= {
        *("config.yaml", "versions.json", "data.json", "partition.parquet", "results.json", "users.parquet"),
        *("clients.csv", "adapters", "checkpoints", "matrices.npz", "matrices.png", "rounds.csv", "finished.json"),
    }
    report = (run / "report.md").read_text()
    assert names - {"finished.json"} == {name for name in names if f"| `{name}` |" in report}, "it says what each is"
    users = pd.read_parquet(run / "users.parquet")
    results = json.loads((run / "results.json").read_text())
    assert users["ndcg_at_10"].mean() == pytest.approx(results["summary"]["ndcg_at_10/pooled"], rel=1e-12)
    per_client = users.groupby("client")["ndcg_at_10"].mean()
    assert per_client.tolist() == pytest.approx(results["per_client"]["ndcg_at_10"], rel=1e-12)
    assert per_client.mean() == pytest.approx(results["summary"]["ndcg_at_10/mean"], rel=1e-12)
    assert per_client.var(ddof=0) == pytest.approx(results["summary"]["ndcg_at_10/variance"], rel=1e-9)
    backbone = load_hf(str(run / "adapters" / "client_00"))
    assert backbone.model.config.hidden_size == 16


def test_mlflow_has_everything(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    client = client_of(folder)
    (run,) = runs_of(folder)
    assert run.info.status == "FINISHED"
    assert run.data.params["aggregation.alpha"] == "0.7"
    assert run.data.params["trainer.num_rounds"] == "2"
    assert [run.data.tags[name] for name in ("rule", "data", "backbone")] == ["fellrec", "synthetic", "tiny"]
    assert len(run.data.tags["git_commit"]) > 6
    results = json.loads((folder / "run" / "results.json").read_text())
    for name in ("ndcg_at_10/mean", "ndcg_at_10/worst_10_percent", "ndcg_at_10/gini", "recall_at_10/pooled"):
        assert run.data.metrics[f"test/{name}"] == pytest.approx(results["summary"][name], rel=1e-9)
    history = client.get_metric_history(run.info.run_id, "train/loss/mean")
    assert [point.step for point in history] == [0, 1]
    validated = client.get_metric_history(run.info.run_id, "val/ndcg_at_10/mean")
    assert [point.step for point in validated] == [-1, 0, 1], "the start of the run is step -1"
    assert history[1].value < history[0].value
    for name in (
        *("val/ndcg_at_10/mean", "val/ndcg_at_10/client/02", "test/ndcg_at_10/client/02", "train/cost/round_seconds"),
        *("train/loss/client/01", "train/aggregation/cosine_to_mean"),
    ):
        assert name in run.data.metrics
    files = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert files >= {
        "config.yaml",
        "clients.csv",
        "clients.json",
        "evaluations.json",
        "results.json",
        "adapters",
        "matrices.npz",
        "matrices.png",
    }
    assert run.data.metrics["train/aggregation/drift"] > 0
    assert 1 <= run.data.metrics["train/aggregation/effective_senders"] <= 3
    of_clients = {name for name in run.data.metrics if re.search(r"/client/\d", name)}
    assert len(of_clients) == 3 * 3, "three figures a client"
    assert len(run.data.metrics) - len(of_clients) <= 40
    assert not set(run.data.params.values()) & {"None", "[]"}
    assert run.data.params["holdout"] == "LeaveOneOut"
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "synthetic"
    assert dataset.dataset.digest == json.loads((folder / "run" / "data.json").read_text())["key"]


def test_the_logged_mixing_matrix_is_fellrecs(finished: tuple[Path, str]) -> None:
    assert not (finished[0] / "run" / "matrices").exists(), "one file for all rounds"
    found = np.load(finished[0] / "run" / "matrices.npz")
    assert found["rounds"].tolist() == [0, 1]
    assert found["similarity"].shape == found["mixing"].shape
    for rows in found["mixing"]:
        assert rows.sum(axis=1) == pytest.approx(1.0, abs=1e-6)
        assert (rows.diagonal() == rows.max(axis=1)).all(), "own weight 1 before division"


def test_evaluate_reproduces_the_runs_own_figures(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished[0])
    main(["evaluate", "run", "--format", "json"])
    shown = json.loads(capsys.readouterr().out)
    results = json.loads((finished[0] / "run" / "results.json").read_text())
    assert shown["rules"]["fellrec"]["mean"] == results["summary"]


def test_recommend_gives_the_list_that_the_test_ranked(
    finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tested user's whole history at its client gives the items of ``rankings.parquet``, with their scores."""
    monkeypatch.chdir(finished[0])
    data = build_data(read_config(Path("run")))
    rankings = pd.read_parquet("run/rankings.parquet").sort_values(["user_id", "rank"])
    user_id, wanted = next(iter(rankings.groupby("user_id", sort=False)))
    user = data.users["user_id"].tolist().index(user_id)
    seen = [data.train.take(np.array([user])).values, data.valid.take(np.array([user])).values]
    titles = [data.catalogue.titles[item] for item in np.concatenate(seen)]
    client = str(wanted["client"].iloc[0])
    main(["recommend", "run", "--client", client, "--format", "json", "-k", "10", "--history", *map(str.upper, titles)])
    shown = json.loads(capsys.readouterr().out)
    assert [item["item_id"] for item in shown["items"]] == wanted["item_id"].tolist()[:10]
    assert [item["score"] for item in shown["items"]] == pytest.approx(wanted["score"].tolist()[:10], abs=1e-5)
    assert [item["rank"] for item in shown["items"]] == list(range(1, 11))
    main(["recommend", "run", "--nearest", "--format", "json", "--history", titles[0]])
    assert json.loads(capsys.readouterr().out)["client"] in range(3)
    misspelt = titles[0][:-1]
    for arguments, said in (
        (["--client", "0", "--history", misspelt], f"no item is called '{misspelt}'; did you mean '{titles[0]}'"),
        (["--client", "3", "--history", titles[0]], "client 3 is not allowed: the run has clients 0 to 2"),
        (["--client", "0", "-k", "61", "--history", titles[0]], "k=61 is not allowed: a whole number from 1 to 60"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["recommend", "run", *arguments])
        assert done.value.code == 1
        assert said in capsys.readouterr().err


def test_an_existing_run_directory_is_refused_and_unchanged(
    finished: tuple[Path, str],
    tiny_overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(finished[0])
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")}
    for verb in ("train", "compare"):
        with pytest.raises(SystemExit) as done:
            main([verb, *tiny_overrides, "run_dir=run"])
        assert done.value.code == 1
        assert "run_dir=run exists and is not empty" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in finished[0].rglob("*")} == before


def test_compare_prints_the_same_figures_as_table_and_json(
    tracked: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ["aggregation=local,fedavg,fellrec,centralized", "seed=0,1", "trainer.num_rounds=1"]
    main(["compare", *tiny_overrides, *sweep, "run_dir=both", "--format", "json", "--quiet"])
    shown = capsys.readouterr()
    assert not re.search("comparison of|on synthetic:|round 1/1", shown.err), "no progress"
    comparison = json.loads(shown.out)
    assert comparison == json.loads((tracked / "both" / "comparison" / "comparison.json").read_text())
    assert list(comparison["rules"]) == [
        *("local", "fedavg", "fellrec", "centralized"),
        *("random", "popularity", "client_popularity", "markov", "markov_decay", "item_knn", "mf", "pretrained"),
    ]
    table = pd.read_csv(tracked / "both" / "comparison" / "comparison.csv")
    lines = (tracked / "both" / "comparison" / "comparison.md").read_text().splitlines()[2:]
    for row, line, rule in zip(table.to_dict("records"), lines, comparison["rules"].values(), strict=False):
        mean = rule["mean"]["ndcg_at_10/mean"]
        assert row["ndcg_at_10_mean"] == pytest.approx(mean, rel=1e-12)
        assert f"{mean:.4f}" in line.split("|")[2]
        assert len(rule["runs"]) == (2 if rule["kind"] == "learned" else 1)
        if rule["kind"] == "learned":
            values = [run["summary"]["ndcg_at_10/mean"] for run in rule["runs"]]
            assert mean == pytest.approx(sum(values) / 2)
            assert row["ndcg_at_10_mean_sd"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
            assert f" ±{abs(values[0] - values[1]) / 2**0.5:.4f}" in line.split("|")[2]
    assert len(table) == len(comparison["rules"])
    assert all(map(pd.api.types.is_numeric_dtype, table.dtypes.drop(["rule", "kind"]))), "numbers"
    report = (tracked / "both" / "comparison" / "report.md").read_text()
    for path in (tracked / "both" / "comparison").iterdir():
        assert f"| `{path.name}` |" in report
    assert "![Clients](clients.png)" in report
    command = shlex.split((tracked / "both" / "command.txt").read_text())
    assert command == ["fellrec", "compare", *tiny_overrides, *sweep, "run_dir=both", "--format", "json", "--quiet"]
    gain = comparison["rules"]["fellrec"]["gain_over_local"]["ndcg_at_10"]
    differences = [
        mine - base
        for run, local in zip(comparison["rules"]["fellrec"]["runs"], comparison["rules"]["local"]["runs"], strict=True)
        for mine, base in zip(run["per_client"]["ndcg_at_10"], local["per_client"]["ndcg_at_10"], strict=True)
    ]
    assert gain == pytest.approx(sum(differences) / len(differences))
    runs = runs_of(tracked)
    (parent,) = [run for run in runs if run.data.tags.get("kind") == "comparison"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 8 == len(runs) - 1
    assert {item.path for item in client_of(tracked).list_artifacts(parent.info.run_id)} >= {"comparison.csv"}


def test_compare_varies_the_settings_of_the_rules_that_have_them(tracked: Path, lean_overrides: list[str]) -> None:
    """Both values of alpha for FELLRec, one run of FedAvg, which has none; alpha = 0 is local training."""
    rules = ["aggregation=fedavg,fellrec,local", "aggregation.alpha=0,0.7", "trainer.num_rounds=1"]
    main(["compare", *lean_overrides, *rules, "run_dir=all"])
    lines = json.loads((tracked / "all" / "comparison" / "comparison.json").read_text())["rules"]
    names = [name for name, line in lines.items() if line["kind"] == "learned"]
    assert names == ["fedavg", "fellrec alpha=0", "fellrec alpha=0.7", "local"]
    assert lines["fellrec alpha=0"]["mean"] == lines["local"]["mean"] != lines["fellrec alpha=0.7"]["mean"]
    assert lines["fellrec alpha=0"]["gain_over_local"]["ndcg_at_10"] == 0
    folders = {path.parent.name for path in (tracked / "all").glob("*/results.json")}
    assert folders == {"fedavg-s0", "fellrec-alpha=0-s0", "fellrec-alpha=0.7-s0", "local-s0"}


def test_compare_tunes_each_rule_by_its_own_settings_on_validation(
    tracked: Path, lean_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The line that is chosen is the best of what selection saw, not of the test."""
    runs = [
        *("--run", "aggregation=local,fedavg trainer.learning_rate=1e-5,1e-2"),
        *("--run", "aggregation=fellrec aggregation.alpha=0.5 trainer.learning_rate=1e-2"),
    ]
    main(["compare", *lean_overrides, *runs, "run_dir=all", "references.show=[]"])
    comparison = json.loads((tracked / "all" / "comparison" / "comparison.json").read_text())
    rates = ["learning_rate=1e-05", "learning_rate=0.01"]
    assert list(comparison["rules"]) == [
        *(f"{rule} {rate}" for rule in ("local", "fedavg") for rate in rates),
        "fellrec learning_rate=0.01",
    ]
    chosen = comparison["chosen_on_validation"]
    assert chosen.pop("fellrec") == "fellrec learning_rate=0.01", "its only line"
    assert set(chosen) == {"local", "fedavg"}
    for rule, line in chosen.items():
        seen = {}
        for rate in rates:
            (run,) = [run for run in runs_of(tracked) if run.info.run_name.startswith(f"{TITLES[rule]} {rate} · ")]
            history = client_of(tracked).get_metric_history(run.info.run_id, "val/ndcg_at_10/mean")
            seen[f"{rule} {rate}"] = max(point.value for point in history)
        assert seen == pytest.approx({name: comparison["rules"][name]["validation"] for name in seen})
        assert line == max(seen, key=lambda name: seen[name])
    assert "best there: local learning_rate=" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("run", "told"),
    [("aggregation='fedavg", "cannot read --run"), ("", "must be overrides"), ("-m", "must be overrides")],
)
def test_compare_refuses_a_run_that_is_no_overrides(
    run: str, told: str, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["compare", f"--run={run}"])
    assert told in capsys.readouterr().err
    assert not list(workplace.iterdir())


def test_compare_refuses_other_sweeps(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["compare", "data.max_history=5,6"])
    assert "compare varies aggregation, the training's settings under trainer, seed and split only, not " in (
        told := capsys.readouterr().err
    )
    assert "data.max_history" in told
    assert not list(workplace.iterdir())


def test_compare_checks_every_rule_before_the_first_one_trains(
    workplace: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["compare", *tiny_overrides, "aggregation=local,fellrec", "aggregation.beta=0"])
    assert done.value.code == 1
    assert "beta" in capsys.readouterr().err
    assert not list(workplace.iterdir())


def test_a_multirun_covers_every_combination_that_a_rule_has_settings_for(
    tracked: Path, lean_overrides: list[str]
) -> None:
    command = ["-m", "fellrec", "train", "-m", *lean_overrides, "trainer.num_rounds=1"]
    code, shown = python([*command, "aggregation=fedavg,fellrec", "aggregation.alpha=0.3,0.7"], tracked)
    assert code == 0, shown
    found = sorted((run.data.tags["rule"], run.data.params.get("aggregation.alpha")) for run in runs_of(tracked))
    assert found == [("fedavg", None), ("fellrec", "0.3"), ("fellrec", "0.7")], "FedAvg has no alpha, and runs once"


def test_a_multirun_checks_every_combination_first(workplace: Path, tiny_overrides: list[str]) -> None:
    code, shown = python(["-m", "fellrec", "train", "-m", *tiny_overrides, "trainer.num_rounds=1,0"], workplace)
    assert code == 1
    assert shown.strip() == "fellrec train: trainer.num_rounds=0 is not allowed: a whole number of at least 1"
    assert not list(workplace.iterdir())


def test_an_interrupted_run_goes_on_where_it_stopped(tracked: Path, tiny_overrides: list[str]) -> None:
    settings = [*tiny_overrides, "trainer.num_rounds=10", "partition.num_clients=2"]
    train = ["-m", "fellrec", "train"]
    code, shown = python([*train, *settings, "run_dir=whole"], tracked)
    assert code == 0, shown
    process = Preloaded([*train, *settings, "run_dir=cut"], tracked, os.environ)
    deadline = time.monotonic() + 120
    while not list((tracked / "cut").glob("checkpoints/round_0000[3-5].json")):
        assert process.poll() is None, process.finish()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    code, shown = process.finish()
    assert code == 130
    assert f"resume={tracked / 'cut'}" in shown
    (killed,) = [run for run in runs_of(tracked) if run.info.status == "KILLED"]
    code, shown = python([*train, "resume=cut"], tracked)
    assert code == 0, shown
    both = [json.loads((tracked / name / "results.json").read_text()) for name in ("whole", "cut")]
    costs = [results.pop("cost") for results in both]
    assert both[0] == both[1]
    assert costs[0]["train_bytes"] == costs[1]["train_bytes"], "the ledger goes on too"
    after = client_of(tracked).get_run(killed.info.run_id)
    assert after.info.status == "FINISHED"
    assert len(runs_of(tracked)) == 2
    steps = [p.step for p in client_of(tracked).get_metric_history(killed.info.run_id, "train/loss/mean")]
    assert steps == list(range(10)), "no round is logged twice"


def test_resume_needs_a_run(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "resume=nowhere"])
    assert "resume=nowhere: no config.yaml there" in capsys.readouterr().err


def test_a_run_of_another_version_is_refused(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = finished
    stored = OmegaConf.load(folder / "run" / "config.yaml")
    del stored.format
    older = folder / "older"
    older.mkdir()
    OmegaConf.save(stored, older / "config.yaml")
    for command in (["train", f"resume={older}"], ["evaluate", str(older)]):
        with pytest.raises(SystemExit):
            main(command)
        assert "has format 0, this version of fellrec reads format 1" in capsys.readouterr().err


def test_mlflow_is_not_sent_the_figures_of_each_of_many_clients(
    tracked: Path, tiny_overrides: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    few = [*tiny_overrides, "run_dir=few", "tracking.max_logged_clients=3", "trainer.num_rounds=1"]
    many = [*tiny_overrides, "run_dir=many", "tracking.max_logged_clients=2", "trainer.num_rounds=1"]
    main(["train", *few])
    assert "max_logged_clients" not in caplog.text
    main(["train", *many])
    assert "3 clients are more than tracking.max_logged_clients=2" in caplog.text
    runs = {run.data.params["run_dir"]: run for run in runs_of(tracked)}
    with_clients, without = (set(runs[name].data.metrics) for name in ("few", "many"))
    assert {name for name in with_clients if re.search(r"/client/\d", name)} == with_clients - without != set()
    client = client_of(tracked)
    artifacts = {name: {f.path for f in client.list_artifacts(runs[name].info.run_id)} for name in runs}
    assert artifacts["few"] - artifacts["many"] == {"adapters", "matrices.npz", "matrices.png"}
    both = [json.loads((tracked / name / "results.json").read_text()) for name in ("few", "many")]
    assert both[0]["per_client"] == both[1]["per_client"], "the run directory has each client's figures"
    assert (tracked / "many" / "adapters" / "client_02").is_dir()
    assert len((tracked / "many" / "clients.csv").read_text().splitlines()) == 4


def test_prepare_prints_statistics(
    workplace: Path, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = [item for item in tiny_overrides if item.startswith(("data.", "cache_dir", "partition."))]
    main(["prepare", *small, "--format", "json"])
    statistics = json.loads(capsys.readouterr().out)["statistics"]
    assert statistics["users"] == 90
    assert sum(statistics["users_per_client"]) == 72


def test_doctor_finds_nothing_wrong(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["doctor"])
    assert done.value.code == 0
    assert "tracking store" in capsys.readouterr().out


def test_a_real_pretrained_model_with_lora(
    workplace: Path, cache: Path, real_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The data and model of the issue's own command, cut to a minute's work; the adapters load with PEFT."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = real_data / "stories260K-hf"
    main(
        [
            *("train", "data=ml_100k", f"data.root={real_data / 'ml-100k'}", "backbone=hf", f"backbone.path={folder}"),
            *("aggregation=fellrec", "data.max_users=60", "trainer.num_rounds=1", "trainer.max_local_steps=2"),
            *("trainer.batch_size=8", f"cache_dir={cache}", "run_dir=run", "--format", "json"),
        ]
    )
    comparison = json.loads(capsys.readouterr().out)
    assert comparison["rules"]["fellrec"]["mean"]["num_users"] == 48
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), workplace / "run/adapters/client_00"
    )
    assert any("lora_A" in name for name, _ in loaded.named_parameters())
