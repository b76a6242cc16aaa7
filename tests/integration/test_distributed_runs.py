"""Runs whose cut is executed over processes: the bits of one model in one process, and one message if one dies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from fellrec.config.compose import compose
from fellrec.config.stored import read_config
from fellrec.distributed.message import PROTOCOL_VERSION
from fellrec.experiment.build import build_backbone, build_data

from .processes import (
    FELLREC,
    ROOT,
    Processes,
    adapters,
    alone,
    assert_same,
    assert_same_run,
    results,
)

pytestmark = pytest.mark.slow

CUT = "split.transport=distributed split.timeout_seconds=30"
MIXED = "adapter=lora adapter.dropout=0.2 trainer.accumulate_grad_batches=2"
GENERATIVE = (
    "objective=generative adapter=lora ranker=grounding ranker.num_beams=2 ranker.max_new_tokens=5 "
    "ranker.reweight=popularity trainer.num_rounds=1 trainer.learning_rate=0.05 aggregation=fedavg"
)
ASYNCHRONOUS = (
    "aggregation=fedbuff aggregation.buffer_size=2 participation.slowdown=9 participation.rate=0.7 "
    "trainer.max_local_steps=2 trainer.num_rounds=3 trainer.evaluate_every=3"
)
"""Fast clients train again while a slow one is at work."""
LONG = "adapter=lora trainer.num_rounds=8 trainer.local_epochs=3"
"""Long enough that a signal after the second round finds every process at work."""
HALVING = """
from fellrec.aggregation import AggregationCallback
from fellrec.federated.records import Aggregated


class Halving(AggregationCallback):
    sees = "nothing"

    def aggregate(self, updates, round_index):
        return Aggregated({name: 0.5 * updates.end[name] for name in updates.end})
"""

Start = Callable[..., Processes]


@pytest.fixture(scope="module")
def common(tiny_overrides: list[str]) -> list[str]:
    return [*tiny_overrides, "backbone.num_layers=4"]


@pytest.fixture
def start(tmp_path: Path, empty_store: Path) -> Iterator[Start]:
    """Start processes; all are ended after the test."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    started: list[Processes] = []

    def run(*commands: Sequence[str], are_one_run: bool = True) -> Processes:
        started.append(Processes(commands, tmp_path, are_one_run))
        return started[-1]

    yield run
    for processes in started:
        processes.kill()


def train(common: Sequence[str], how: str, run_dir: Path) -> list[str]:
    return ["train", *common, *how.split(), f"run_dir={run_dir}", f"tracking.uri=sqlite:///{run_dir.parent}/mlflow.db"]


@pytest.mark.parametrize(
    ("how", "num_processes", "is_launched"),
    [(MIXED, 3, True), (GENERATIVE, 3, False), (ASYNCHRONOUS, 2, False)],
    ids=["by Fabric", "numbered", "asynchronous"],
)
def test_processes_give_the_bits_of_one_model(
    common: list[str], start: Start, tmp_path: Path, how: str, num_processes: int, is_launched: bool
) -> None:
    """The same adapters, optimiser states, matrices and test results; what crosses the cut is recorded."""
    alone(train(common, how, tmp_path / "whole"))
    command = [*FELLREC, *train(common, f"{how} {CUT} trainer.devices={num_processes}", tmp_path / "cut")]
    processes = start(command, are_one_run=False) if is_launched else start(*[command] * num_processes)
    assert set(processes.wait()) == {0}, processes.output()
    assert processes.output().count("Run directory:") == 1, "process 0 alone prints"
    assert_same_run(tmp_path / "cut", tmp_path / "whole", has_same_ledger=False)
    trained = adapters(tmp_path / "cut")[0]
    assert {name.split(".")[2] for name in trained if ".layers." in name} >= {"0", "1", "2", "3"}, "also the body's"
    assert "hidden_state" in (tmp_path / "cut" / "ledger.csv").read_text()


def test_the_coordinator_chooses_precision_and_attention_for_all_processes(
    common: list[str], start: Start, tmp_path: Path
) -> None:
    """What it measured is in its configuration; a run with these values has the same bits."""
    how = "adapter=lora trainer.num_rounds=1"
    auto = f"{how} {CUT} trainer.devices=3 trainer.precision=auto trainer.attention=auto"
    processes = start([*FELLREC, *train(common, auto, tmp_path / "cut")], are_one_run=False)
    assert set(processes.wait()) == {0}, processes.output()
    chosen = read_config(tmp_path / "cut").trainer
    assert {chosen.precision, chosen.attention}.isdisjoint({"auto"})
    given = f"{how} trainer.precision={chosen.precision} trainer.attention={chosen.attention}"
    alone(train(common, given, tmp_path / "whole"))
    assert_same_run(tmp_path / "cut", tmp_path / "whole", has_same_ledger=False)


def test_a_run_through_the_cut_survives_the_loss_of_any_process_and_resumes_with_another_number(
    common: list[str], start: Start, tmp_path: Path
) -> None:
    """First a client process of three dies, then the server of two. Process 0 alone prints why, once."""
    alone(train(common, LONG, tmp_path / "whole"))
    run_dir = tmp_path / "cut"
    three = start(*[[*FELLREC, *train(common, f"{LONG} {CUT} trainer.devices=3", run_dir)]] * 3)
    three.wait_for("round 2/8")
    three.send(1, signal.SIGKILL)
    assert three.wait() == [1, -signal.SIGKILL, 1], three.output()
    (message,) = three.errors()
    assert "process 1 (a client process) has ended" in message
    assert re.search(r"client \d", message), message
    assert re.search(r"in round \d", message), message
    assert three.output(2) == "", "process 0 has printed it"

    resume = [*FELLREC, "train", f"resume={run_dir}", "trainer.devices=2"]
    two = start(*[resume] * 2)
    two.wait_for("round 5/8")
    assert "round 1/8" not in two.output()
    two.send(1, signal.SIGKILL)
    assert two.wait() == [1, -signal.SIGKILL], two.output()
    (message,) = two.errors()
    assert re.search(r"process 1 \(the server\) has ended.*, in round \d, client \d", message), message

    last = start(resume, are_one_run=False)
    assert last.wait() == [0], last.output()
    assert_same_run(run_dir, tmp_path / "whole", has_same_ledger=False)


def test_the_run_continues_without_a_client_process_if_it_may(common: list[str], start: Start, tmp_path: Path) -> None:
    """Its client misses the round at most; process 0 trains all clients from then on, and none is lost."""
    how = f"{LONG} {CUT} participation.on_failure=skip participation.quorum=0.3 trainer.devices=3"
    processes = start(*[[*FELLREC, *train(common, how, tmp_path / "run")]] * 3)
    processes.wait_for("round 2/8")
    processes.send(1, signal.SIGKILL)
    assert processes.wait() == [0, -signal.SIGKILL, 0], processes.output()
    found = results(tmp_path / "run")
    assert sum(len(clients) for clients in found.get("dropped_clients", {}).values()) <= 1
    assert "round 8/8" in processes.output()
    assert found["summary"].get("num_clients_without_users", 0) == 0
    assert len(list((tmp_path / "run" / "adapters").iterdir())) == 3


def test_a_process_that_is_silent_is_not_waited_for(common: list[str], start: Start, tmp_path: Path) -> None:
    """The coordinator is stopped: the server reports it, because nothing else can."""
    how = f"{LONG} {CUT} split.timeout_seconds=4 trainer.devices=2"
    processes = start(*[[*FELLREC, *train(common, how, tmp_path / "run")]] * 2)
    processes.wait_for("round 2/8")
    processes.send(0, signal.SIGSTOP)
    processes.wait_for("process 0 (a client process) did not answer for 4 s (split.timeout_seconds)", process=1)
    processes.send(0, signal.SIGKILL)
    assert processes.wait() == [-signal.SIGKILL, 1]
    assert len(processes.errors(1)) == 1


def test_processes_that_differ_refuse_each_other(common: list[str], start: Start, cache: Path, tmp_path: Path) -> None:
    """Settings, and the files of a backbone, which each process may have in a folder of its own."""
    config = compose(common)
    build_backbone(config, build_data(config))
    configs = cache.glob("backbones/*/config.json")  # other tests have made others
    folder = next(path.parent for path in configs if json.loads(path.read_text())["num_hidden_layers"] == 4)
    for name in ("here", "there"):
        shutil.copytree(folder, tmp_path / name)
    other = json.loads((tmp_path / "there" / "config.json").read_text())
    (tmp_path / "there" / "config.json").write_text(json.dumps({**other, "rms_norm_eps": 0.1}))
    settings = [item for item in common if not item.startswith("backbone.")]
    how = f"backbone=hf {CUT} aggregation=fellrec trainer.devices=2"
    own = [
        "backbone.path=here",
        "backbone.path=there split.head_layers=2 split.hidden_dtype=int8 aggregation.alpha=0.1",
    ]
    processes = start(*[[*FELLREC, *train(settings, f"{how} {mine}", tmp_path / "run")] for mine in own])
    assert processes.wait() == [1, 1], processes.output()
    (message,) = processes.errors()
    assert "process 0 (a client process) and process 1 (the server) differ in aggregation.alpha: 0.7 and 0.1" in message
    for difference in ("backbone's files: ", "split.head_layers: 1 and 2", "split.hidden_dtype: 'float32' and 'int8'"):
        assert difference in message, message
    assert "backbone.path" not in message, "it may differ"
    assert not processes.errors(1), "process 0 has printed it"
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("[!.]*")), "nothing was begun"


def test_a_users_rule_that_exchanges_nothing_gives_the_same_adapters_however_it_is_executed(
    common: list[str], start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It returns half of each client's own adapter: whole, through the cut, over processes, and both together.

    After one round, that is half of what the clients have if each keeps what it trained.
    """
    (tmp_path / "halving.py").write_text(HALVING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)
    alone(train(common, "aggregation=local adapter=lora trainer.num_rounds=1", tmp_path / "local"))
    expected = [{name: 0.5 * tensor for name, tensor in client.items()} for client in adapters(tmp_path / "local")]
    how = "aggregation._target_=halving.Halving adapter=lora trainer.num_rounds=1"
    alone(train(common, how, tmp_path / "whole"))
    alone(train(common, f"{how} split.transport=inprocess", tmp_path / "cut"))
    for name, more in {"two": "trainer.devices=2", "three": f"{CUT} trainer.devices=3"}.items():
        processes = start(*[[*FELLREC, *train(common, f"{how} {more}", tmp_path / name)]] * int(more[-1]))
        assert set(processes.wait()) == {0}, processes.output()
    for name in ("whole", "cut", "two", "three"):
        assert_same(adapters(tmp_path / name), expected, name)
        assert "adapter" not in (tmp_path / name / "ledger.csv").read_text(), "nothing leaves a client"


def test_what_cannot_be_read_is_named_on_both_sides(start: Start) -> None:
    """Process 1 sends what a process of another version, or a broken one, would send; process 0 reads it."""
    driver = str(ROOT / "tests" / "integration" / "channel_driver.py")
    processes = start(*[[driver]] * 2)
    assert processes.wait() == [0, 0], processes.output()
    heard = [dict(line.rstrip("\n").split("> ", 1) for line in lines if "> " in line) for lines in processes.lines]
    hidden = "HiddenState of client 3 in round 2: its tensor"
    problems = {
        "dtype": "process 1 sent a malformed message: a tensor of the unknown type 'complex64'",
        "integers": f"{hidden} is torch.int64, expected a floating type",
        "shape": f"{hidden} has shape [4, 4], expected [B, L, D]",
        "labels": "malformed message HiddenState",
        "abort": "process 1 stopped: no more",
    }
    for case, problem in problems.items():
        assert problem in heard[0][case], heard[0]
        if case != "abort":
            assert problem in heard[1][case], heard[1]
    assert f"process 1 has protocol version 99, process 0 has {PROTOCOL_VERSION}" in heard[0]["version"]
    assert f"process 0 has protocol version {PROTOCOL_VERSION}, process 1 has 99" in heard[1]["version"]
