"""Experiments and benchmarks run from end to end on a few synthetic users, so that they do not rot."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pandas as pd
import pytest

from fellrec.commands.compare import configurations

ROOT = Path(__file__).resolve().parents[2]


def cells(markdown: Path) -> pd.DataFrame:
    """The first table of a Markdown file."""
    lines = [line for line in markdown.read_text().split("\n\n")[0].splitlines() if not line.startswith("|---")]
    header, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return pd.DataFrame(rows, columns=header)


def test_the_sweep_over_depths_and_its_report(tmp_path: Path, tiny_overrides: list[str]) -> None:
    """LLaMA-7B, METHOD §4: a layer has 202,383,360 weights of 6,738,415,616; 31 − k of them are on the server."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "DEPTHS": "0,1",
        "ROUNDS": "1",
        "MODEL": " ".join(
            [
                "backbone.num_layers=3",
                *(item for item in tiny_overrides if "backbone" in item and "num_layers" not in item),
            ]
        ),
        "PLANNED_DEPTHS": "1,14,21,22",
    }
    small = [*(item for item in tiny_overrides if "backbone" not in item), "data.max_users=40"]
    script = ROOT / "experiments" / "split_depth" / "sweep.sh"
    command = ["sh", str(script), "out", *small, f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    measured, planned = cells(out / "measured.md"), cells(out / "planned.md")
    assert measured["k"].tolist() == ["0", "1"]
    assert (measured["NDCG@10"] == measured["NDCG@10 unsplit"]).all()
    assert measured["client MB"].astype(float).is_monotonic_increasing
    assert planned["k + m"].tolist() == ["2", "15", "22", "23"]
    assert planned["storage saved, %"].astype(float).tolist() == pytest.approx(
        [100 * (31 - k) * 202_383_360 / 6_738_415_616 for k in (1, 14, 21, 22)], abs=0.01
    )
    assert "storage saved, %: 28 is reached up to k = 21 (k + m = 22), which saves 30.0 %" in done.stdout
    assert "compute saved, %: 48 is reached up to k = 14" in done.stdout
    plans = json.loads((out / "llama_2_7b.json").read_text())
    assert plans[0]["backbone"] == "llama_2_7b"
    assert matplotlib.image.imread(out / "split_depth.png").std() > 0.02


def test_what_the_sweep_over_rules_runs_can_be_composed(tmp_path: Path) -> None:
    """The runs themselves take an hour; that each of their commands is one is seen without them."""
    script = ROOT / "experiments" / "does_fellrec_help" / "sweep.sh"
    command = ["sh", str(script), str(tmp_path / "out"), "ml-1m", "games", "trainer.batch_size=32"]
    environment = {**os.environ, "FELLREC": "echo", "SEEDS": "0,1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[:2] for line in lines] == [["compare", "data=ml_1m"], ["compare", "data=games"]]
    for _, *overrides in lines:
        configs = configurations(overrides)
        assert len(configs) == 10, "five rules, two seeds"
        assert {config.backbone.name for config in configs} == {"sasrec"}
        assert {config.trainer.batch_size for config in configs} == {32}


def test_the_benchmark_of_the_cut(tmp_path: Path, tiny_overrides: list[str]) -> None:
    script = ROOT / "benchmarks" / "split_throughput.py"
    options = ["--rounds", "2", "--repeats", "1", "--parts", "inprocess,packing"]
    small = [*tiny_overrides, "backbone.num_layers=4", "data.max_users=40"]
    command = [sys.executable, str(script), *options, *small]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for text in ("| 1 | 1 |", "| 1 | 4 |", "| float32 |", "| int8 |"):
        assert text in done.stdout
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
