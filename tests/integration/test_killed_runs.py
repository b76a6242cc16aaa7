"""A run that is killed anywhere and resumed ends with the same bits as one that was left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fellrec.federated.callback import HOOKS

RUN = [
    "trainer.num_rounds=3",
    "participation.rate=0.6",
    "trainer.warmup_steps=4",
    "trainer.learning_rate_decay=cosine",
    "trainer.batch_size=64",
]


class Runs:
    """Talks to ``killed_runs.py``."""

    def __init__(self, folder: Path, overrides: list[str]) -> None:
        self.folder = folder
        self.errors = folder / "errors"
        driver = Path(__file__).with_name("killed_runs.py")
        paths = [str(driver.parents[1]), os.environ.get("PYTHONPATH", "")]  # run_tensors.py is a folder above
        self.process = subprocess.Popen(
            [sys.executable, str(driver)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("w"),
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._send(overrides)

    def _send(self, value: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()

    def run(self, name: str, **order: Any) -> int:
        """Exit status of a run; negative for a signal."""
        self._send({"run_dir": str(self.folder / name), **order})
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        assert answer, self.errors.read_text()
        return int(answer)

    def result(self, name: str) -> dict[str, Any]:
        """Everything a finished run came to."""
        run = self.folder / name
        found = {
            file: (run / file).read_bytes()
            for file in ("results.json", "users.parquet", "rankings.parquet", "state.json")
        }
        return {**found, "tensors": torch.load(run / "tensors.pt")}

    def trained(self, name: str) -> list[int]:
        return list(json.loads((self.folder / name / "trained.json").read_text()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Iterator[Runs]:
    found = Runs(tmp_path_factory.mktemp("killed"), [*tiny_overrides, *RUN])
    assert found.run("whole") == 0, found.errors.read_text()
    yield found
    assert found.process.stdin is not None
    found.process.stdin.close()
    assert found.process.wait(timeout=60) == 0


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def kill_and_resume(runs: Runs, at: str, number: int, name: str, **more: Any) -> bool:
    """Whether the run was killed; either way it must end like the one that was not."""
    shutil.rmtree(runs.folder / name, ignore_errors=True)
    status = runs.run(name, at=at, number=number, **more)
    assert status in (0, -signal.SIGKILL), runs.errors.read_text()
    if status:
        can_resume = any((runs.folder / name / "checkpoints").glob("round_*.json"))
        assert runs.run(name, resume=can_resume, **more) == 0, runs.errors.read_text()
    assert_same(runs.result(name), runs.result("whole"))
    return status != 0


@pytest.mark.parametrize(
    ("at", "number", "trains"),
    [
        pytest.param("on_step_end", 1, 6, id="in the first client"),
        pytest.param("on_step_end", 5, None, id="in a later client"),
        pytest.param("on_client_start", 2, 5, id="between two clients of the first round"),
        pytest.param("on_client_end", 3, 3, id="after a client of the second round"),
        pytest.param("on_aggregate_start", 2, 2, id="before an aggregation"),
        pytest.param("on_aggregate_end", 2, 2, id="after an aggregation"),
        pytest.param("on_evaluate_start", 3, 2, id="in an evaluation"),
        pytest.param("on_evaluate_end", 3, 2, id="after an evaluation"),
        pytest.param("on_round_end", 2, 2, id="after logging, before the checkpoint"),
        pytest.param("on_evaluate_start", 5, 0, id="in the test"),
        pytest.param("on_fit_end", 1, 0, id="after the test"),
    ],
)
def test_a_killed_run_ends_with_the_same_bits(runs: Runs, at: str, number: int, trains: int | None) -> None:
    """And no client that had finished is trained again: so many of the six are."""
    assert kill_and_resume(runs, at, number, "phase")
    if trains is not None:
        assert len(runs.trained("phase")) == trains
    assert len(runs.trained("whole")) == 6


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_wherever_a_file_is_written(runs: Runs, data: st.DataObject) -> None:
    """Before a draft is renamed and after, of adapters, optimiser states, aggregated adapters, ledger and manifest."""
    at = data.draw(st.integers(1, 70))
    kill_and_resume(runs, "write", at, "write")


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_wherever_a_hook_is_called(runs: Runs, data: st.DataObject) -> None:
    hook = data.draw(st.sampled_from([name for name in HOOKS if name != "on_exception"]))
    every = data.draw(st.integers(1, 3))
    kill_and_resume(runs, hook, data.draw(st.integers(1, 6)), "hook", every=every)


def test_a_run_can_be_killed_again_and_again(runs: Runs) -> None:
    """Each time a little further on; what was saved in the middle of a round is used and saved again."""
    kills = [("on_client_end", 1), ("on_aggregate_start", 1), ("write", 9), ("on_round_end", 1), ("on_step_end", 1)]
    for number, (at, count) in enumerate(kills):
        assert runs.run("often", resume=number > 0, at=at, number=count) == -signal.SIGKILL, runs.errors.read_text()
    assert runs.run("often", resume=True) == 0, runs.errors.read_text()
    assert_same(runs.result("often"), runs.result("whole"))


def test_nothing_is_left_over(runs: Runs) -> None:
    """After a run the files are those that the kept checkpoints name, drafts of killed runs included."""
    assert kill_and_resume(runs, "write", 30, "tidy")
    folders = [runs.folder / name / "checkpoints" for name in ("tidy", "whole")]
    left = [{path.relative_to(folder).name for path in folder.rglob("*")} for folder in folders]
    assert left[0] == left[1]
    assert not [name for name in left[0] if name.startswith(".")]
