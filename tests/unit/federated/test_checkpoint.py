"""Checkpoints: what is damaged is named and the one before it used; nothing but what is needed stays."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.config.compose import compose
from fellrec.errors import CheckpointError, TrainingError
from fellrec.experiment import Recommender, build_data, build_loop, build_recommender
from fellrec.federated.checkpoint import load_state, rounds_on_disk
from fellrec.federated.ledger import Ledger
from fellrec.federated.loop import FederatedLoop
from fellrec.state.files import read_checked, write_checked

Make = Callable[..., FederatedLoop]


@pytest.fixture(scope="module")
def recommender(tiny_overrides: list[str]) -> Recommender:
    config = compose(tiny_overrides)
    return build_recommender(config, build_data(config))


@pytest.fixture(scope="module")
def make(recommender: Recommender, tiny_overrides: list[str]) -> Make:
    def build(run_dir: Path, *overrides: str, resume: bool = False) -> FederatedLoop:
        run_dir.mkdir(exist_ok=True)
        loop = build_loop(compose([*tiny_overrides, "trainer.num_rounds=3", *overrides]), recommender, ())
        checkpoint = Checkpoint(run_dir)
        if resume:
            checkpoint.resume(loop)
        loop.callbacks.append(checkpoint)
        return loop

    return build


@pytest.fixture(scope="module")
def finished(make: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FederatedLoop]:
    folder = tmp_path_factory.mktemp("finished")
    loop = make(folder)
    loop.run()
    return folder, loop


def only_in_newest(folder: Path) -> Path:
    """A client's file that the newest manifest names and the one before it does not."""
    named = [set(read_checked(folder / f"round_0000{n}.json")["banks"]["current"]) for n in (2, 3)]
    return folder / "clients" / min(named[1] - named[0])


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(bytes(content))


DAMAGES = {
    "a changed manifest": lambda folder: flip(folder / "round_00003.json", -20),
    "half a manifest": lambda folder: (folder / "round_00003.json").write_bytes(
        (folder / "round_00003.json").read_bytes()[:200]
    ),
    "an empty manifest": lambda folder: (folder / "round_00003.json").write_bytes(b""),
    "a changed adapter": lambda folder: flip(only_in_newest(folder), -1),
    "a missing adapter": lambda folder: only_in_newest(folder).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_used(
    finished: tuple[Path, FederatedLoop], make: Make, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says which file and why, and the run ends with the same bits."""
    run_dir, whole = tmp_path / "run", finished[1]
    shutil.copytree(finished[0], run_dir)
    broken = only_in_newest(run_dir / "checkpoints") if "adapter" in damage else "round_00003.json"
    DAMAGES[damage](run_dir / "checkpoints")
    with caplog.at_level(logging.WARNING):
        loop = make(run_dir, resume=True)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("the checkpoint of round 3 is left out: ")
    assert str(broken) in message
    assert "damaged" in message or "missing" in message
    assert loop.state.round_index == 2
    loop.run()
    for name in ("current", "best", "best_per_client"):
        found, expected = loop.state.bank_named(name).tensors, whole.state.bank_named(name).tensors
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert loop.execution.ledger.rows() == whole.execution.ledger.rows()
    assert rounds_on_disk(run_dir / "checkpoints") == [2, 3]


def test_when_all_are_damaged_there_is_an_error(
    finished: tuple[Path, FederatedLoop], make: Make, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    for path in (run_dir / "checkpoints").glob("round_*.json"):
        flip(path, 100)
    with pytest.raises(CheckpointError, match=f"every checkpoint in {run_dir}/checkpoints is damaged"):
        make(run_dir, resume=True)


def test_a_checkpoint_that_is_asked_for_is_not_replaced_by_another(
    finished: tuple[Path, FederatedLoop], make: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(finished[0] / "checkpoints", folder)
    state = make(tmp_path / "other").state
    load_state(folder, state, 2)
    assert state.round_index == 2
    flip(folder / "round_00002.json", 50)
    with pytest.raises(CheckpointError, match="round_00002.json is damaged"):
        load_state(folder, state, 2)
    with pytest.raises(TrainingError, match="no checkpoint of round 1"):
        load_state(folder, state, 1)


@pytest.mark.parametrize("kept", [1, 3])
def test_as_many_checkpoints_stay_as_asked_for_and_no_file_that_none_of_them_needs(
    make: Make, tmp_path: Path, kept: int
) -> None:
    loop = make(tmp_path / "run", f"trainer.checkpoints_kept={kept}", "participation.rate=0.6")
    loop.run()
    folder = tmp_path / "run" / "checkpoints"
    assert rounds_on_disk(folder) == [1, 2, 3][-kept:]
    needed = set()
    for path in folder.glob("round_*.json"):
        manifest = read_checked(path)
        needed |= {name for names in manifest["banks"].values() for name in names} | set(
            manifest["optimizers"].values()
        )
    assert {path.name for path in (folder / "clients").iterdir()} == needed


def test_best_adapters_are_references_not_copies(finished: tuple[Path, FederatedLoop]) -> None:
    folder = finished[0] / "checkpoints"
    manifest = read_checked(folder / "round_00003.json")
    assert manifest["selection"]["round_index"] == 2, "the last round is the best, so that there is something to share"
    assert manifest["banks"]["best"] == manifest["banks"]["current"]


def test_another_populations_checkpoint_is_refused(
    finished: tuple[Path, FederatedLoop], make: Make, tmp_path: Path
) -> None:
    state = make(tmp_path / "run", "aggregation=centralized").state
    with pytest.raises(TrainingError, match="the checkpoint has 3 clients, this run has 1"):
        load_state(finished[0] / "checkpoints", state)


def test_a_client_that_was_made_from_something_else_trains_again(
    finished: tuple[Path, FederatedLoop], make: Make, tmp_path: Path
) -> None:
    """Left over from a run that went another way: its file is whole, and still not used."""
    run_dir = tmp_path / "run"
    first = make(run_dir, "trainer.num_rounds=1")
    first.run()
    loop = make(run_dir, resume=True)
    other = make(tmp_path / "other", "seed=1", "trainer.num_rounds=1")
    other.run()
    loop.state.keep_on_disk(run_dir / "checkpoints" / "clients")
    other.state.keep_on_disk(tmp_path / "other" / "checkpoints" / "clients")
    update = other.execution.train(other, (0,), 1).updates[0]
    assert other.state.round_index == 1
    for path in (tmp_path / "other" / "checkpoints" / "clients").glob("000000.*-00001.*"):
        shutil.copy(path, run_dir / "checkpoints" / "clients")
    assert loop.state.recover(0) is None
    own = loop.execution.train(loop, (0,), 1).updates[0]
    assert own.loss != update.loss
    again = make(run_dir, resume=True)
    again.state.keep_on_disk(run_dir / "checkpoints" / "clients")
    assert again.state.recover(0) == own


def test_both_sides_of_the_cut_go_back_to_a_round_that_both_have(tiny_overrides: list[str], tmp_path: Path) -> None:
    """The server's newest share is damaged: the clients' own is whole, and is not used either."""
    config = compose(
        [*tiny_overrides, "split.transport=inprocess", "split.head_layers=0", "trainer.num_rounds=3", "adapter=lora"]
    )

    def build() -> FederatedLoop:
        return build_loop(config, build_recommender(config, build_data(config)), ())

    whole = build()
    whole.callbacks.append(Checkpoint(tmp_path))
    whole.run()
    flip(tmp_path / "checkpoints-server" / "round_00003.json", 60)
    again, checkpoint = build(), Checkpoint(tmp_path)
    checkpoint.resume(again)
    assert again.state.round_index == 2
    again.callbacks.append(checkpoint)
    again.run()
    assert all(torch.equal(t, whole.state.bank.tensors[name]) for name, t in again.state.bank.tensors.items())


def test_a_ledger_in_parts_is_the_whole_ledger(tmp_path: Path) -> None:
    whole, parts = Ledger(), Ledger()
    for round_index in range(3):
        for ledger in (whole, parts):
            for client in range(2):
                ledger.add(client, round_index, "train", "up", "adapter", 100 + round_index)
                ledger.add(client, 0, "val", "down", "scalar", 8)
        parts.archive(tmp_path, round_index)
    assert parts.rows() == whole.rows()
    assert parts.total(direction="down") == 3 * 2 * 8
    assert parts.num_messages(client=1) == whole.num_messages(client=1) == 6
    pd_rows = parts.frame().to_dict("records")
    assert pd_rows == whole.frame().to_dict("records")
    resumed = Ledger()
    resumed.reopen(tmp_path, 1)
    assert resumed.total(round=2) == 0
    assert resumed.total(round=1) == 202


def test_checked_json_is_exact_and_guarded(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"b": [0.1, -float("inf"), 1e-300, None], "a": {"ü": "\n"}}
    write_checked(path, value)
    assert read_checked(path) == value
    assert list(read_checked(path)) == ["b", "a"]
    path.write_text(json.dumps({"checksum": "0", "content": value}))
    with pytest.raises(CheckpointError, match="its checksum differs"):
        read_checked(path)
