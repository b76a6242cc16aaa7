"""Runs in several real processes: the bits of one model in one process, and failures that everybody hears of."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from .processes import LONGEST_SECONDS, ROOT, Processes, environment

CUT = ["split=executed", "split.transport=distributed", "backbone.num_layers=4", "split.timeout_seconds=30"]
MIXED = "adapter=lora adapter.dropout=0.2 trainer.accumulate_grad_batches=2 split.in_flight=3"
GENERATIVE = (
    "objective=generative adapter=lora ranker=grounding ranker.num_beams=2 ranker.max_new_tokens=5 "
    "ranker.reweight=popularity trainer.num_rounds=1 trainer.learning_rate=0.05 aggregation=fedavg"
)
LONG = "adapter=lora trainer.num_rounds=12 trainer.local_epochs=6"
"""Long enough that a signal after the second round finds every process at work."""


@pytest.fixture(scope="module")
def overrides(tiny_overrides: list[str]) -> list[str]:
    return tiny_overrides


@pytest.fixture(scope="module")
def unsplit(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of the same run with the whole model in one process; made once for each setting."""
    folder, done = tmp_path_factory.mktemp("unsplit"), dict[str, Path]()

    def run(how: str) -> Path:
        if how not in done:
            done[how] = folder / str(len(done))
            given = [*overrides, "backbone.num_layers=4", *how.split(), *where(done[how])]
            subprocess.run(
                [sys.executable, "-m", "fellrec", "train", *(item for item in given if "in_flight" not in item)],
                env=environment(), cwd=folder, check=True, capture_output=True, timeout=LONGEST_SECONDS,
            )  # fmt: skip
        return done[how]

    return run


@pytest.fixture
def start(overrides: list[str], tmp_path: Path) -> Iterator[Callable[..., Processes]]:
    """Start processes of a run in ``tmp_path / "run"``; all are ended after the test."""
    started: list[Processes] = []

    def run(how: str, num_processes: int = 3, own: Sequence[Sequence[str]] = ()) -> Processes:
        base = ["-m", "fellrec", "train", *overrides, *CUT, *how.split(), *where(tmp_path / "run")]
        commands = [[*base, *(own[rank] if rank < len(own) else ())] for rank in range(num_processes)]
        started.append(Processes(commands, tmp_path))
        return started[-1]

    yield run
    for processes in started:
        processes.kill()


def where(run_dir: Path) -> list[str]:
    return [f"run_dir={run_dir}", f"tracking.uri=sqlite:///{run_dir}.db"]


def history(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Every logged figure of every round, without times, sizes and traffic."""
    client = MlflowClient(f"sqlite:///{run_dir}.db")
    (run,) = client.search_runs([client.get_experiment_by_name("fellrec").experiment_id])  # type: ignore[union-attr]
    names = [name for name in run.data.metrics if not name.startswith("cost/") and "seconds" not in name]
    return {
        name: sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
        for name in names
    }


def assert_same_run(expected: Path, found: Path) -> None:
    """The same adapters, the same figures of every round, the same test results of every user."""
    files = sorted(path.relative_to(expected) for path in expected.glob("adapters/*/*.safetensors"))
    assert files
    assert files == sorted(path.relative_to(found) for path in found.glob("adapters/**/*.safetensors"))
    for file in files:
        left, right = load_file(expected / file), load_file(found / file)
        assert left.keys() == right.keys()
        assert not [name for name in left if not torch.equal(left[name], right[name])], file
    for name in ("users.parquet", "rankings.parquet"):
        pd.testing.assert_frame_equal(pd.read_parquet(expected / name), pd.read_parquet(found / name))
    results = [json.loads((folder / "results.json").read_text()) for folder in (expected, found)]
    assert results[0]["summary"] == results[1]["summary"]
    left_history, right_history = history(expected), history(found)
    assert len([name for name in left_history if name.startswith("val/")]) > 10
    assert left_history == right_history


@pytest.mark.parametrize(("how", "num_processes"), [(MIXED, 2), (MIXED, 3), (GENERATIVE, 3)])
def test_several_processes_give_the_bits_of_one_model(
    start: Callable[..., Processes], unsplit: Callable[[str], Path], tmp_path: Path, how: str, num_processes: int
) -> None:
    processes = start(how, num_processes)
    assert processes.wait() == [0] * num_processes, processes.output(1)
    assert_same_run(unsplit(how), tmp_path / "run")
    written = [
        name
        for path in (tmp_path / "run" / "checkpoints-server" / "clients").glob("0*.safetensors")
        for name in load_file(path)
    ]
    assert {name.split(".")[2] for name in written} == {"1", "2"}, "the server trains the body's layers"


def test_torchrun_starts_a_run(overrides: list[str], unsplit: Callable[[str], Path], tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    how = [*overrides, *CUT, *MIXED.split(), "split.server_ranks=1", *where(tmp_path / "run")]
    done = subprocess.run(
        [*torchrun, "-m", "fellrec", "train", *how],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Run directory:") == 1, "only the first client process reports"
    assert_same_run(unsplit(MIXED), tmp_path / "run")


@pytest.mark.parametrize(
    ("victim", "name"), [(0, "rank 0 (the server)"), (1, "rank 1 (a client process)"), (2, "rank 2 (a client process)")]
)
def test_a_process_that_dies_ends_the_run_everywhere_and_it_can_be_resumed(
    start: Callable[..., Processes], unsplit: Callable[[str], Path], tmp_path: Path, victim: int, name: str
) -> None:
    processes = start(LONG)
    processes.wait_for("round 2/12", rank=1)
    processes.send(victim, signal.SIGKILL)
    codes = processes.wait()
    assert codes[victim] == -signal.SIGKILL
    assert [codes[rank] for rank in range(3) if rank != victim] == [1, 1]
    for rank in {0, 1, 2} - {victim}:
        lines = [line for line in processes.lines[rank] if line.startswith("fellrec train: ")]
        assert len(lines) == 1, processes.output(rank)
        assert f"{name} is gone" in lines[0]
        assert "round" in lines[0], lines
    if victim == 2:  # once is enough: the checkpoints are the same
        return
    resumed = Processes([["-m", "fellrec", "train", f"resume={tmp_path / 'run'}"]] * 3, tmp_path)
    assert resumed.wait() == [0, 0, 0], resumed.output(1)
    assert "round 1/12" not in resumed.output(1)
    assert_same_run(unsplit(LONG), tmp_path / "run")


def test_a_process_that_is_silent_is_not_waited_for(start: Callable[..., Processes]) -> None:
    processes = start(f"{LONG} split.timeout_seconds=3")
    processes.wait_for("round 2/12", rank=1)
    processes.send(2, signal.SIGSTOP)
    processes.wait_for("rank 2 (a client process) was silent for 3 s (split.timeout_seconds)", rank=1)
    processes.send(2, signal.SIGKILL)
    assert processes.wait()[:2] == [1, 1]


def test_the_run_goes_on_without_a_client_process_if_it_may(start: Callable[..., Processes], tmp_path: Path) -> None:
    processes = start(f"{LONG} participation.on_failure=skip")
    processes.wait_for("round 2/12", rank=1)
    processes.send(2, signal.SIGKILL)
    assert processes.wait() == [0, 0, -signal.SIGKILL], processes.output(1)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["lost_clients"] == [1], "the three clients live in ranks 1, 2, 1"
    assert set(map(tuple, results["dropped_clients"].values())) == {(1,)}
    assert results["summary"]["num_clients_without_users"] == 1
    assert "The process of clients 1 is gone" in processes.output(1)
    assert {path.name for path in (tmp_path / "run" / "adapters").iterdir()} == {"client_00", "client_02"}


def test_another_number_of_processes_cannot_go_on(start: Callable[..., Processes], tmp_path: Path) -> None:
    assert start(f"{MIXED} trainer.num_rounds=1").wait() == [0, 0, 0]
    resumed = Processes([["-m", "fellrec", "train", f"resume={tmp_path / 'run'}"]] * 2, tmp_path)
    assert resumed.wait() == [1, 1]
    assert "was trained by 2 client processes" in resumed.output(1)
    assert "start 3 processes" in resumed.output(1)


@pytest.mark.parametrize(
    ("rank", "own", "problem"),
    [
        (0, "split.head_layers=2", "split.head_layers: 1 and 2"),
        (2, "aggregation.alpha=0.1", "aggregation.alpha: 0.7 and 0.1"),
        (2, "split.hidden_dtype=int8", "split.hidden_dtype: 'float32' and 'int8'"),
    ],
)
def test_processes_that_differ_refuse_each_other(
    start: Callable[..., Processes], tmp_path: Path, rank: int, own: str, problem: str
) -> None:
    processes = start("aggregation=fellrec", own=[own.split() if number == rank else [] for number in range(3)])
    assert processes.wait() == [1, 1, 1]
    for reader in range(3):
        (line,) = [line for line in processes.lines[reader] if line.startswith("fellrec train: ")]
        assert problem in line, line
        assert f"rank {rank}" in line
        assert "rank 1" in line
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir()), "nothing was begun"


def test_another_backbone_is_refused(
    overrides: list[str], unsplit: Callable[[str], Path], cache: Path, tmp_path: Path
) -> None:
    unsplit(MIXED)
    configs = cache.glob("backbones/*/config.json")  # other tests have made others
    folder = next(path.parent for path in configs if json.loads(path.read_text())["num_hidden_layers"] == 4)
    for name in ("here", "there"):
        shutil.copytree(folder, tmp_path / name)
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    (tmp_path / "there" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    small = [item for item in [*overrides, *CUT] if not item.startswith("backbone.")]
    command = ["-m", "fellrec", "train", *small, "backbone=hf", *where(tmp_path / "run")]
    processes = Processes(
        [[*command, f"backbone.path={tmp_path / name}"] for name in ("here", "here", "there")], tmp_path
    )
    assert processes.wait() == [1, 1, 1]
    assert "rank 1 (a client process) and rank 2 (a client process) differ in backbone's" in processes.output(1)


def test_too_few_processes_are_refused(overrides: list[str], tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fellrec", "train", *overrides, *CUT],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "torchrun --nproc-per-node 3" in done.stderr
    alone = Processes([["-m", "fellrec", "train", *overrides, *CUT]], tmp_path)
    assert alone.wait() == [1]
    assert "needs at least 2 processes" in alone.output(0)


DRIVER = str(ROOT / "tests" / "integration" / "wire_driver.py")


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        ("version", "rank 1 speaks protocol version 99, rank 0 speaks 1"),
        ("dtype", "rank 1 sent a tensor of the unknown type complex64"),
        ("integers", "HiddenState of client 3 in round 2: its tensor is torch.int64, expected a floating type"),
        ("shape", "HiddenState of client 3 in round 2: its tensor has shape [4, 4], expected [B, L, D]"),
        ("labels", "malformed message HiddenState"),
        ("abort", "rank 1 (a client process) stopped: no more"),
    ],
)
def test_what_cannot_be_read_is_named_on_both_sides(case: str, problem: str, tmp_path: Path) -> None:
    processes = Processes([[DRIVER, case]] * 2, tmp_path)
    assert processes.wait() == [1, 1]
    assert problem in processes.output(0), processes.output(0)
    if case == "version":
        assert "rank 0 speaks protocol version 1, rank 1 speaks 99" in processes.output(1)
    elif case != "abort":
        assert problem in processes.output(1), processes.output(1)
