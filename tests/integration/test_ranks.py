"""Clients over ranks, in real processes: the same bits whatever their number, and failures that everybody hears of."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fellrec.cli.main import main
from fellrec.config.compose import read_config
from fellrec.experiment import build_data, build_loop, build_recommender
from fellrec.federated.state import RunState

from .processes import LONGEST_SECONDS, Processes, environment

CLIENTS = ["partition.num_clients=5", "trainer.timeout_seconds=100"]
MIXED = (
    "aggregation=fellrec,updatemixing,fedavg,centralized adapter=lora adapter.dropout=0.2 "
    "trainer.accumulate_grad_batches=2 participation.rate=0.7 participation.on_failure=skip "
    "objective._target_=fragile.Fragile"
)
FRAGILE = """
from fellrec.models.objectives.retrieval import RetrievalObjective

class Fragile(RetrievalObjective):
    def loss(self, model, batch):
        if len(batch["input_ids"]) == 14:  # all that client 3 has; no other batch is as large
            raise RuntimeError("out of memory")
        return super().loss(model, batch)
"""
LONG = "trainer.num_rounds=6 trainer.local_epochs=8"
"""Long enough that a signal after the second round finds every rank at work."""

Start = Callable[..., Processes]


def arguments(verb: str, how: str, run_dir: Path) -> list[str]:
    return [verb, *how.split(), f"run_dir={run_dir}", f"tracking.uri=sqlite:///{run_dir}.db"]


@pytest.fixture(scope="module")
def common(tiny_overrides: list[str]) -> str:
    return " ".join([*tiny_overrides, *CLIENTS])


@pytest.fixture
def start(common: str, tmp_path: Path) -> Iterator[Start]:
    """Start the ranks of one command as torchrun does; all are ended after the test."""
    started: list[Processes] = []

    def run(verb: str, how: str, num_ranks: int, name: str = "run") -> Processes:
        given = arguments(verb, f"{common} {how} trainer.devices={num_ranks}", tmp_path / name)
        started.append(Processes([["-m", "fellrec", *given]] * num_ranks, tmp_path))
        return started[-1]

    yield run
    for processes in started:
        processes.kill()


def alone(arguments: list[str]) -> None:
    """The same in this one process, with as many threads as the ranks have: what a sum is depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main(arguments)
    finally:
        torch.set_num_threads(threads)


def started_by_the_first(arguments: list[str], folder: Path) -> None:
    """Several ranks, without torchrun or srun."""
    done = subprocess.run(
        [sys.executable, "-m", "fellrec", *arguments],
        env=environment(), cwd=folder, capture_output=True, text=True, timeout=LONGEST_SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def final_state(run_dir: Path) -> RunState:
    """What the last checkpoint holds."""
    config = read_config(run_dir)
    loop = build_loop(config, build_recommender(config, build_data(config)), ())
    loop.execution.load(loop, run_dir)
    return loop.state


def assert_same_bits(left: Path, right: Path) -> None:
    """Every tensor of the last and the selected adapters, every round's mixing, and all figures."""
    ours, theirs = final_state(left), final_state(right)
    assert ours.local_steps == theirs.local_steps
    for bank in ("current", "best", "best_per_client"):
        for row in range(len(ours.bank_named(bank))):
            mine, other = ours.bank_named(bank).row(row), theirs.bank_named(bank).row(row)
            assert mine.keys() == other.keys()
            assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items()), (bank, row)
    files = [
        path.relative_to(left)
        for path in sorted(left.rglob("*"))
        if {"adapters", "matrices"} & {*path.parts} and path.is_file() and path.name != "adapter_config.json"
    ]  # PEFT writes a set there, in any order
    assert files
    for name in (*files, "clients.csv", "ledger.csv", "users.parquet", "rankings.parquet"):
        assert (left / name).read_bytes() == (right / name).read_bytes(), name
    assert results(left) == results(right)


def results(run_dir: Path) -> dict[str, Any]:
    """All figures but those of time and memory."""
    found = json.loads((run_dir / "results.json").read_text())
    return {name: value for name, value in found.items() if name != "cost"}


@pytest.fixture(scope="module")
def long_run(common: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long run in one process that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("long") / "run"
    alone(arguments("train", f"{common} {LONG}", run_dir))
    return run_dir


def test_one_two_and_three_ranks_give_the_same_bits(
    common: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, accumulated gradients, absent clients, one that fails; rank 0 alone says or writes anything."""
    (tmp_path / "fragile.py").write_text(FRAGILE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)
    alone(arguments("compare", f"{common} {MIXED}", tmp_path / "one"))
    for num_ranks in (2, 3):
        processes = start("compare", MIXED, num_ranks, str(num_ranks))
        assert processes.wait() == [0] * num_ranks, processes.output(0)
        for rule in ("fellrec", "updatemixing", "fedavg", "centralized"):
            assert_same_bits(tmp_path / "one" / f"{rule}-s0", tmp_path / str(num_ranks) / f"{rule}-s0")
        assert results(tmp_path / str(num_ranks) / "fellrec-s0")["dropped_clients"] == {"0": [3], "1": [3]}
        assert "FedAvg" in processes.output(0)
        assert [processes.output(rank) for rank in range(1, num_ranks)] == [""] * (num_ranks - 1)


def test_samples_and_kept_item_vectors_do_not_depend_on_the_number_of_ranks(
    common: str, start: Start, tmp_path: Path
) -> None:
    how = (
        "objective.item_encoder=encoded objective.refresh_items=2 objective.freeze_items_after=1 "
        "objective.num_negatives=20 objective.negatives=popularity objective.order=newest_first "
        "data.max_users=40 data.max_history=3 trainer.max_local_steps=3 trainer.batch_size=8"
    )
    alone(arguments("train", f"{common} {how}", tmp_path / "one"))
    processes = start("train", how, 2, "two")
    assert processes.wait() == [0, 0], processes.output(0)
    assert_same_bits(tmp_path / "one", tmp_path / "two")


def test_two_ranks_that_train_each_client_together_are_as_good_as_one(common: str, tmp_path: Path) -> None:
    """Sums of gradients in another order, and batches with an odd number of rows. The ranks are started by the first.

    Both take the same sample of a batch, also after a batch of one row, which the second has nothing of.
    """
    how = f"{common} aggregation=local trainer.batch_size=8 trainer.local_epochs=2 objective.num_negatives=20"
    alone(arguments("train", how, tmp_path / "one"))
    config = read_config(tmp_path / "one")
    loaders = build_recommender(config, build_data(config)).datamodule
    assert 1 in [len(batch["input_ids"]) for client in range(5) for batch in loaders.train_loader(client, 0)]
    together = f"{how} trainer.devices=2 trainer.devices_per_client=2"
    started_by_the_first(arguments("train", together, tmp_path / "two"), tmp_path)
    one, two = (final_state(tmp_path / name).bank for name in ("one", "two"))
    pairs = [(one.row(row)[name], two.row(row)[name]) for row in range(len(one)) for name in one.row(row)]
    assert any(not torch.equal(left, right) for left, right in pairs), "the gradients were summed in another order"
    for left, right in pairs:
        assert (left - right).norm() <= 1e-6 * left.norm()


def test_a_rank_that_dies_ends_all_and_the_run_goes_on_with_fewer(start: Start, long_run: Path, tmp_path: Path) -> None:
    processes = start("train", LONG, 3)
    processes.wait_for("round 2/6", rank=0)
    processes.send(2, signal.SIGKILL)
    assert processes.wait() == [1, 1, -signal.SIGKILL]
    said = [line for line in processes.output(0).splitlines() if line.startswith("fellrec train: ")]
    assert len(said) == 1, processes.output(0)
    assert re.search(r"rank 2 is gone while it was (training client \d in round \d|scoring the users of)", said[0])
    assert processes.output(1) == "", "rank 0 has said it"
    started_by_the_first(["train", f"resume={tmp_path / 'run'}", "trainer.devices=2"], tmp_path)
    assert_same_bits(long_run, tmp_path / "run")


def test_without_rank_0_the_others_leave_and_the_run_goes_on_in_one_process(
    start: Start, long_run: Path, tmp_path: Path
) -> None:
    processes = start("train", LONG, 2)
    processes.wait_for("round 2/6", rank=0)
    processes.send(0, signal.SIGKILL)
    assert processes.wait() == [-signal.SIGKILL, 1]
    assert re.fullmatch(r"fellrec train: rank 1: rank 0 is gone while this rank was .*\n", processes.output(1))
    alone(["train", f"resume={tmp_path / 'run'}", "trainer.devices=1"])
    assert_same_bits(long_run, tmp_path / "run")


def test_a_run_can_go_on_without_a_rank(start: Start, tmp_path: Path) -> None:
    """The client that died with it misses the round; rank 0 trains the others, and all from then on."""
    processes = start("train", f"{LONG} participation.on_failure=skip participation.quorum=0.2", 2)
    processes.wait_for("round 2/6", rank=0)
    processes.send(1, signal.SIGKILL)
    assert processes.wait() == [0, -signal.SIGKILL], processes.output(0)
    dropped = results(tmp_path / "run").get("dropped_clients", {})
    assert sum(len(clients) for clients in dropped.values()) <= 1
    assert results(tmp_path / "run")["summary"]["ndcg_at_10/mean"] > 0
