"""A run that is told to stop: the exit status, what is on the disk, and the same numbers after it goes on."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from omegaconf import OmegaConf

from fellrec.cli.main import main
from fellrec.errors import Preempted
from fellrec.launch.preemption import GRACE_VARIABLE, INTERRUPT, StopSignals
from fellrec.state.lock import hold

ROUNDS = "trainer.num_rounds=6"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """The run directory of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    main(["train", *tiny_overrides, ROUNDS, f"run_dir={folder / 'run'}", store_in(folder), "--format", "json"])
    return folder / "run"


def store_in(folder: Path) -> str:
    """With its whole path: MLflow opens a store once in a process, wherever the process is by then."""
    return f"tracking.uri=sqlite:///{folder / 'mlflow.db'}"


def results(run_dir: Path) -> dict[str, Any]:
    """All figures but those of time."""
    found = json.loads((run_dir / "results.json").read_text())
    return {name: value for name, value in found.items() if name != "cost"}


def runs_of(folder: Path) -> list[Any]:
    client = MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fellrec")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def send_when(is_time: Callable[[], bool], number: signal.Signals) -> threading.Thread:
    """Send a signal to this process, the run in it, as soon as something is so."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while not is_time() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGTERM, 143)])
def test_a_run_stops_at_a_safe_point_and_goes_on_with_the_same_numbers(
    number: signal.Signals,
    code: int,
    whole: Path,
    tiny_overrides: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGUSR1, signal.SIGTERM, signal.SIGALRM)]
    run = tmp_path / "run"
    sender = send_when(lambda: any((run / "checkpoints").glob("round_*2.json")), number)
    with pytest.raises(SystemExit) as stopped:
        main(["train", *tiny_overrides, ROUNDS, f"run_dir={run}", store_in(tmp_path)])
    sender.join()
    assert stopped.value.code == code
    shown = capsys.readouterr().err
    assert f"fellrec train: {number.name} stopped the run after" in shown
    assert f"fellrec train resume={run}" in shown
    assert [signal.getsignal(each) for each in (signal.SIGUSR1, signal.SIGTERM, signal.SIGALRM)] == handlers
    assert not (run / "results.json").exists()
    (killed,) = runs_of(tmp_path)
    assert killed.info.status == "KILLED"
    main(["train", f"resume={run}", "--format", "json"])
    assert results(run) == results(whole)
    (finished,) = runs_of(tmp_path)
    assert (finished.info.run_id, finished.info.status) == (killed.info.run_id, "FINISHED")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    history = client.get_metric_history(finished.info.run_id, "train/loss/mean")
    assert [point.step for point in history] == list(range(6))


def test_a_run_without_a_checkpoint_starts_again_from_its_own_configuration(whole: Path, tmp_path: Path) -> None:
    """It was stopped before its first round was done; its name is no expression of Hydra's."""
    run = tmp_path / "a, b={c}"
    run.mkdir()
    config = OmegaConf.load(whole / "config.yaml")
    config.tracking.uri = store_in(tmp_path).partition("=")[2]
    OmegaConf.save(config, run / "config.yaml")
    main(["train", f"resume={run}", store_in(tmp_path), "--format", "json"])
    assert results(run) == results(whole)
    assert runs_of(tmp_path)[0].data.params["trainer.num_rounds"] == "6"
    assert not [key for key in runs_of(tmp_path)[0].data.params if key.startswith("launcher")]


def test_a_run_that_comes_to_no_safe_point_ends_when_its_grace_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GRACE_VARIABLE, "0.2")
    with StopSignals() as signals:
        signals.stop_at("before any signal")  # does nothing
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(Preempted, match="SIGUSR1 stopped the run before its next safe point") as stopped:
            time.sleep(60)
    assert stopped.value.exit_code == 75


def test_only_the_first_signal_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM sends SIGTERM too when a run that was warned takes its time: it is still to be started again."""
    monkeypatch.delenv(GRACE_VARIABLE, raising=False)
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Preempted) as stopped:
            signals.stop_at("after round 0")
    assert stopped.value.exit_code == 75
    time.sleep(0.01)  # no timer is left


def test_a_directory_in_use_is_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in whole.iterdir())
    with hold(whole), pytest.raises(SystemExit) as done:
        main(["train", f"resume={whole}"])
    assert done.value.code == 1
    assert f"run directory {whole} is in use by process {os.getpid()}" in capsys.readouterr().err
    assert [name for name in sorted(path.name for path in whole.iterdir()) if ".lock" not in name] == [
        name for name in before if ".lock" not in name
    ]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_a_finaliser_drops_counts_at_the_next_safe_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(INTERRUPT, "_last", -math.inf)

    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    with StopSignals() as signals:
        signals.stop_at("before")
        Finalised()
        with pytest.raises(KeyboardInterrupt):
            signals.stop_at("after round 3")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(INTERRUPT, "_last", -math.inf)
    with pytest.raises(KeyboardInterrupt), StopSignals():
        signal.raise_signal(signal.SIGINT)
