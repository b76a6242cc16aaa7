"""Comparisons and sweeps that are interrupted by Ctrl-C and resumed end as those that are left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from preloaded import Preloaded, python

SWEEP = ["aggregation=local,fedavg,fellrec", "trainer.num_rounds=3", "partition.num_clients=2", "references.show=[]"]
NAMES = ("local-s0", "fedavg-s0", "fellrec-s0")
TIMED = {
    *("measured", "run_id", "seconds_per_round", "cpu_seconds_per_round", "total_seconds", "peak_memory_bytes"),
}
"""What two runs of the same command do not share."""


def interrupted(arguments: list[str], workplace: Path, when: str) -> str:
    """Press Ctrl-C as soon as a file is there; gives what was printed."""
    process = Preloaded(["-m", "fellrec", *arguments], workplace, os.environ)
    deadline = time.monotonic() + 120
    while not list(workplace.glob(when)):
        assert process.poll() is None, process.finish()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    code, shown = process.finish()
    assert code == 130, shown
    return shown


def same(value: Any) -> Any:
    """Without what depends on the clock and the machine."""
    if isinstance(value, dict):
        return {key: same(item) for key, item in value.items() if key not in TIMED}
    return [same(item) for item in value] if isinstance(value, list) else value


def test_an_interrupted_comparison_and_sweep_end_as_if_left_alone(
    tmp_path: Path, tiny_overrides: list[str], empty_store: Path
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    settings = [*tiny_overrides, *SWEEP]
    code, shown = python(["-m", "fellrec", "compare", *settings, "run_dir=whole", "tracking.uri=null"], tmp_path)
    assert code == 0, shown
    whole = json.loads((tmp_path / "whole" / "comparison" / "comparison.json").read_text())

    shown = interrupted(
        ["compare", *settings, "run_dir=cut"], tmp_path, "cut/fedavg-s0/checkpoints/round_0000[12].json"
    )
    assert f"interrupted; resume the comparison by: fellrec compare resume={tmp_path / 'cut'}\n" in shown
    assert "train resume=" not in shown, "one command is advised"
    kept = [path for path in (tmp_path / "cut" / "local-s0").rglob("*.*") if "outbox" not in path.parts]
    times = {path: path.stat().st_mtime_ns for path in kept}
    assert not (tmp_path / "cut" / "fellrec-s0" / "checkpoints").exists(), "it had not begun"
    code, shown = python(["-m", "fellrec", "compare", "resume=cut"], tmp_path)
    assert code == 0, shown
    assert {path: path.stat().st_mtime_ns for path in kept} == times, "a finished run is kept"
    assert same(json.loads((tmp_path / "cut" / "comparison" / "comparison.json").read_text())) == same(whole)
    for file in ("comparison.md", "significance.csv", "reachable.csv"):
        found, expected = ((tmp_path / name / "comparison" / file).read_text() for name in ("cut", "whole"))
        if file == "comparison.md":  # the last column is seconds
            found, expected = (
                [line.rpartition("|")[0].rpartition("|")[0] for line in text.splitlines() if line.startswith("|")]
                for text in (found, expected)
            )
        assert found == expected

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fellrec")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags.get("kind") == "comparison"]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == 3 == len(runs) - 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert not any("resume" in run.data.params for run in children)

    sweep = ["train", "-m", *settings, "run_dir=sweep", "tracking.uri=null"]
    shown = interrupted(sweep, tmp_path, "sweep/001-fedavg-s0/checkpoints/round_0000[12].json")
    assert f"interrupted; resume the sweep by: fellrec train -m resume={tmp_path / 'sweep'}\n" in shown
    code, shown = python(["-m", "fellrec", "train", "-m", "resume=sweep"], tmp_path)
    assert code == 0, shown
    assert "000-local-s0: finished, kept as it is" in shown
    for number, name in enumerate(NAMES):
        paths = (tmp_path / "sweep" / f"{number:03d}-{name}", tmp_path / "whole" / name)
        found, expected = (same(json.loads((path / "results.json").read_text())) for path in paths)
        assert found == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "resume=nowhere"], "resume=nowhere: no runs.json there; give the directory of a comparison"),
        (["compare", "resume=sweep"], "resume=sweep is a sweep; resume it by: fellrec train -m resume=sweep"),
        (["train", "-m", "resume=both"], "resume=both is a comparison; resume it by: fellrec compare resume=both"),
        (["train", "resume=both"], "resume=both is a comparison; resume it by: fellrec compare resume=both"),
        (["compare", "resume=both/fedavg-s0"], "resume=both/fedavg-s0 is one run; resume it by: fellrec train resume="),
        (["compare", "resume=both", "seed=1"], "'seed=1' is not allowed: a run keeps its own configuration"),
        (["compare", "resume=both", "--run", "seed=1"], "--run is not allowed with resume=both"),
        (
            ["compare", "resume=odd"],
            "odd/runs.json names '../both/fedavg-s0', which is not the directory of a run in odd",
        ),
        (["compare", "resume=bad"], "bad/runs.json cannot be read"),
    ],
)
def test_what_cannot_be_resumed_is_named(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    tiny_overrides: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fellrec.cli.main import main
    from fellrec.config.compose import compose
    from fellrec.experiment.group import write_group

    monkeypatch.chdir(tmp_path)
    configs = {"fedavg-s0": compose([*tiny_overrides, "aggregation=fedavg", "tracking.uri=null"])}
    write_group(Path("both"), "comparison", configs)
    write_group(Path("sweep"), "sweep", configs)
    for name, text in (("odd", '{"kind": "comparison", "runs": ["../both/fedavg-s0"]}'), ("bad", "{")):
        Path(name).mkdir()
        Path(name, "runs.json").write_text(text)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 1
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
