"""What somebody who did not know the program ran into: each case was reported."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fellrec.cli.main import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """A folder with a finished run ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        main(["train", *tiny_overrides, "references.show=[popularity]", "run_dir=run"])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in the current folder."""
    shutil.copytree(trained / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail by one message and print no results; gives the message."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(list(arguments))
    assert done.value.code == 1
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert not shown.out
    return " ".join(shown.err.split())


def test_a_run_that_is_not_finished_is_not_evaluated(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it is after Ctrl-C in the second round."""
    (run_dir / "results.json").unlink()
    (run_dir / "rankings.parquet").unlink()
    (run_dir / "checkpoints" / "round_00002.json").unlink()
    for stage in ("val", "test"):
        shown = refused(capsys, "evaluate", "run", "--stage", stage)
        assert "run: round 1 of 2, not finished; resume it: fellrec train resume=run" in shown
    assert "the run is not finished" in refused(capsys, "export", "run", "--format", "trec")


def test_a_run_without_checkpoints_is_not_evaluated(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run_dir / "checkpoints")
    shown = refused(capsys, "evaluate", "run")
    assert "run has no checkpoint, and nothing to evaluate" in shown
    assert "~callbacks.checkpoint" in shown
    assert "resume" not in shown


def test_a_comparison_is_not_a_run(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("local-s0", "fedavg-s0"):
        (run_dir.parent / "both" / name).mkdir(parents=True)
        shutil.copy(run_dir / "config.yaml", run_dir.parent / "both" / name)
    hint = "it is a comparison or a sweep; give one of its runs: fedavg-s0, local-s0"
    for command in (
        ("evaluate", "both"),
        ("train", "resume=both"),
        ("submit", "resume=both", "--dry-run"),
        ("export", "both", "--format", "trec"),
    ):
        assert hint in refused(capsys, *command)
