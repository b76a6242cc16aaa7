"""Clients over processes: the same bits whatever their number and whatever started them; one message if one dies."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fellrec.config.stored import read_config
from fellrec.experiment.build import build_data, build_recommender

from .processes import FELLREC, TORCHRUN, Processes, adapters, alone, assert_same_run, results

pytestmark = pytest.mark.slow

CLIENTS = ["partition.num_clients=5", "trainer.timeout_seconds=100"]
MIXED = (
    "aggregation=fellrec,updatemixing,centralized,scaffold,ifca,fedbuff adapter=lora adapter.dropout=0.2 "
    "trainer.accumulate_grad_batches=2 participation.rate=0.7 participation.on_failure=skip participation.slowdown=4 "
    "objective._target_=fragile.Fragile poison.clients=[1] poison.kind=label_flip"
)
FRAGILE = """
from fellrec.models.objectives.retrieval import RetrievalObjective

class Fragile(RetrievalObjective):
    def loss(self, model, batch):
        if len(batch["input_ids"]) == 14:  # all that client 3 has; no other batch is as large
            raise RuntimeError("out of memory")
        return super().loss(model, batch)
"""
SAMPLES = (
    "objective.item_encoder=encoded objective.refresh_items=2 objective.freeze_items_after=1 "
    "objective.num_negatives=20 objective.negatives=popularity objective.order=newest_first "
    "data.max_users=40 data.max_history=3 trainer.max_local_steps=3 trainer.batch_size=8"
)
LONG = "trainer.num_rounds=6 trainer.local_epochs=4"
"""Long enough that a signal after the second round finds every process at work."""

Start = Callable[..., Processes]


def arguments(verb: str, how: str, run_dir: Path) -> list[str]:
    return [verb, *how.split(), f"run_dir={run_dir}", f"tracking.uri=sqlite:///{run_dir.parent}/mlflow.db"]


@pytest.fixture(scope="module")
def common(tiny_overrides: list[str]) -> str:
    return " ".join([*tiny_overrides, *CLIENTS])


@pytest.fixture
def start(tmp_path: Path, empty_store: Path) -> Iterator[Start]:
    """Start processes; all are ended after the test."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    started: list[Processes] = []

    def run(*commands: list[str], are_one_run: bool = True) -> Processes:
        started.append(Processes(commands, tmp_path, are_one_run))
        return started[-1]

    yield run
    for processes in started:
        processes.kill()


@pytest.fixture(scope="module")
def long_run(common: str, tmp_path_factory: pytest.TempPathFactory, empty_store: Path) -> Path:
    """A long run in one process that was not interrupted."""
    run_dir = tmp_path_factory.mktemp("long") / "run"
    shutil.copy(empty_store, run_dir.parent / "mlflow.db")
    alone(arguments("train", f"{common} {LONG}", run_dir))
    return run_dir


def test_three_processes_that_fabric_starts_give_the_bits_of_one(
    common: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, accumulated gradients, absent, late and failing clients, losses before a round; process 0 alone prints."""
    (tmp_path / "fragile.py").write_text(FRAGILE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)
    alone(arguments("compare", f"{common} {MIXED}", tmp_path / "one"))
    command = arguments("compare", f"{common} {MIXED} trainer.devices=3", tmp_path / "three")
    processes = start([*FELLREC, *command], are_one_run=False)
    assert processes.wait() == [0], processes.output()
    for rule in ("fellrec", "updatemixing", "centralized", "scaffold", "ifca", "fedbuff"):
        assert_same_run(tmp_path / "three" / f"{rule}-s0", tmp_path / "one" / f"{rule}-s0")
    assert results(tmp_path / "three" / "fellrec-s0")["dropped_clients"] == {"0": [3], "1": [3]}
    assert processes.output().count("NDCG@10 and Recall@10:") == 1, "one table"


def test_samples_and_kept_item_vectors_do_not_depend_on_the_processes_that_torchrun_starts(
    common: str, start: Start, tmp_path: Path
) -> None:
    alone(arguments("train", f"{common} {SAMPLES}", tmp_path / "one"))
    processes = start(
        [*TORCHRUN, *arguments("train", f"{common} {SAMPLES} trainer.devices=3", tmp_path / "three")],
        are_one_run=False,
    )
    assert processes.wait() == [0], processes.output()
    assert processes.output().count("Run directory:") == 1, "process 0 alone prints"
    assert_same_run(tmp_path / "three", tmp_path / "one")


def test_two_processes_that_train_each_client_together_are_as_good_as_one(
    common: str, start: Start, tmp_path: Path
) -> None:
    """Sums of gradients in another order, and batches with an odd number of rows.

    Both take the same sample of a batch, also after a batch of one row, of which the second process has nothing.
    """
    how = f"{common} aggregation=local trainer.batch_size=8 trainer.local_epochs=2 objective.num_negatives=20"
    alone(arguments("train", how, tmp_path / "one"))
    config = read_config(tmp_path / "one")
    loaders = build_recommender(config, build_data(config)).datamodule
    assert 1 in [len(batch["input_ids"]) for client in range(5) for batch in loaders.train_loader(client, 0)]
    together = f"{how} trainer.devices=2 trainer.devices_per_client=2"
    processes = start(*[[*FELLREC, *arguments("train", together, tmp_path / "two")]] * 2)
    assert processes.wait() == [0, 0], processes.output()
    one, two = adapters(tmp_path / "one"), adapters(tmp_path / "two")
    pairs = [(left[name], right[name]) for left, right in zip(one, two, strict=True) for name in left]
    assert any(not torch.equal(left, right) for left, right in pairs), "the gradients were summed in another order"
    for left, right in pairs:
        assert (left - right).norm() <= 1e-6 * left.norm()


def test_processes_that_train_several_clients_at_once_are_as_good_as_one(
    common: str, start: Start, tmp_path: Path
) -> None:
    """Five clients by two processes: groups of three and of two, and callbacks that count the steps of both."""
    how = f"{common} aggregation=fedavg adapter=lora adapter.dropout=0.1 trainer.max_local_steps=3"
    alone(arguments("train", how, tmp_path / "one"))
    together = f"{how} trainer.devices=2 trainer.clients_per_step=3"
    processes = start(*[[*FELLREC, *arguments("train", together, tmp_path / "two")]] * 2)
    assert processes.wait() == [0, 0], processes.output()
    for left, right in zip(adapters(tmp_path / "one"), adapters(tmp_path / "two"), strict=True):
        for name in left:
            assert (left[name] - right[name]).norm() <= 1e-5 * left[name].norm(), name


def test_a_process_that_dies_ends_the_run_which_another_number_of_processes_resumes(
    common: str, start: Start, long_run: Path, tmp_path: Path
) -> None:
    """First a worker of three that Fabric started, then process 0 of two; one process finishes the run."""
    run_dir = tmp_path / "run"
    command = arguments("train", f"{common} {LONG} trainer.devices=3", run_dir)
    three = start([*FELLREC, *command], are_one_run=False)
    three.wait_for("round 2/6")
    os.kill(three.children()[2], signal.SIGKILL)
    assert three.wait() == [1], three.output()
    (message,) = three.errors()
    doing = r"(training client \d in round \d|scoring the users of client \d)"
    assert re.search(rf"process 2 has ended while it was {doing}", message), message

    resume = ["train", f"resume={run_dir}"]
    two = start(*[[*FELLREC, *resume, "trainer.devices=2"]] * 2)
    two.wait_for("round 4/6")
    assert "round 1/6" not in two.output()
    two.send(0, signal.SIGKILL)
    assert two.wait() == [-signal.SIGKILL, 1]
    doing = r"(training client \d in round \d|scoring users of client \d)"
    (message,) = two.errors(1)
    assert re.search(rf"process 0 has ended while this process was {doing}", message), message

    alone([*resume, "trainer.devices=1"])
    assert_same_run(run_dir, long_run)
