"""Checkpoints: what is damaged is named and the one before it used; nothing but what is needed stays."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.config.compose import compose
from fellrec.errors import CheckpointError, TrainingError
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import build_federation
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.ledger import Ledger
from fellrec.state.files import read_checked, write_checked
from fellrec.state.tensor_store import TensorStore, open_store

Make = Callable[..., "Checkpointed"]


class Checkpointed:
    """A loop with its checkpoint callback."""

    def __init__(self, config: DictConfig, recommender: Recommender, run_dir: Path, resume: bool = False) -> None:
        self.federation = build_federation(config, recommender)
        self.parts = self.federation.persisted
        self.folder = CheckpointFolder(run_dir / "checkpoints")
        trainer = config.trainer
        checkpoint = Checkpoint(run_dir, self.parts, self.federation.population, keep=trainer.checkpoints_kept)
        if resume:
            checkpoint.resume()
        self.loop = self.federation.loop([checkpoint])

    def adapters(self) -> list[dict[str, torch.Tensor]]:
        """The current, the selected and each client's best adapters, one after the other."""
        population, selection = self.federation.population, self.federation.selection
        state = selection.state_dict()
        versions = [*population.bank.versions, *state["served"], *state["client_served"]]
        return [dict(version.tensors()) for version in versions]


def assert_same(left: Checkpointed, right: Checkpointed) -> None:
    for mine, other in zip(left.adapters(), right.adapters(), strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in mine.items())


@pytest.fixture(scope="module")
def recommender(tiny_overrides: list[str]) -> Recommender:
    config = compose(tiny_overrides)
    return build_recommender(config, build_data(config))


@pytest.fixture(scope="module")
def make(recommender: Recommender, tiny_overrides: list[str]) -> Make:
    def build(run_dir: Path, *overrides: str, resume: bool = False) -> Checkpointed:
        run_dir.mkdir(exist_ok=True)
        config = compose([*tiny_overrides, "trainer.num_rounds=3", *overrides])
        return Checkpointed(config, recommender, run_dir, resume)

    return build


@pytest.fixture(scope="module")
def finished(make: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checkpointed]:
    folder = tmp_path_factory.mktemp("finished")
    run = make(folder)
    run.loop.run()
    return folder, run


def states(folder: Path, number: int) -> dict[str, Any]:
    """The states in a manifest."""
    return dict(read_checked(folder / f"round_{number:05d}.json")["states"])


def only_in_newest(folder: Path) -> Path:
    """A client's file that the newest manifest names and the one before it does not."""
    named = [{entry["$stored"] for entry in states(folder, n)["population"]["adapters"]} for n in (2, 3)]
    return folder / "tensors" / min(named[1] - named[0])


def test_what_a_checkpoint_names_is_on_the_disk_before_it(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that loses power keeps what was flushed; a file that is named by a manifest must not be empty then."""
    events: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def flushing(handle: int) -> None:
        fsync(handle)
        events.append(("flushed", Path(os.readlink(f"/proc/self/fd/{handle}")).name))

    def naming(draft: Path, path: Path) -> None:
        replace(draft, path)
        events.append(("named", Path(path).name))

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "replace", naming)
    run = make(tmp_path / "run")
    run.loop.run()
    manifests = [event for event in events if event[0] == "named" and event[1].startswith("round_")]
    assert manifests[-1] == ("named", "round_00003.json")
    flushed: list[str] = []
    for manifest in manifests:
        before = events[: events.index(manifest)]
        flushed = [name for what, name in before if what == "flushed"]
        path = run.folder.folder / manifest[1]
        if path.exists():  # the older ones are gone
            assert set(read_checked(path)["files"]) <= set(flushed)
            assert flushed[-2] == "tensors"  # their names, and then the draft of the manifest
    named = Counter(name for what, name in events if what == "named" and name.endswith(".safetensors"))
    written = Counter(name for name in flushed if name.endswith(".safetensors"))
    assert written <= named, "nothing is flushed twice"
    assert not [name for name in written if ".trained-" in name], "nor what an aggregation replaces"


class Held:
    """A part with a tensor of its own, a version that has no file yet, and one that has."""

    def __init__(self, folder: Path) -> None:
        self.store = open_store(folder)

    def state_dict(self) -> dict[str, Any]:
        tensors = {"a": torch.ones(3)}
        versions = {"version": TensorStore().put(0, tensors), "file": self.store.put(0, tensors, "same")}
        return {"own": torch.ones(2), **versions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing is kept."""


def test_a_round_that_is_saved_again_is_flushed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files have the names of those that were flushed before, and are others."""
    flushed: list[str] = []
    fsync = os.fsync

    def flushing(handle: int) -> None:
        flushed.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flushing)
    folder = CheckpointFolder(tmp_path / "checkpoints")
    held, new = Held(folder.tensors), ["held.version.00000.safetensors", "parts.00000.safetensors"]
    saved = []
    for step in range(4):
        flushed.clear()
        folder.save({"held": held}, 0)
        saved.append(sorted(name for name in flushed if name.endswith(".safetensors")))
        if step == 2:
            folder.load({"held": held})
    assert saved == [["000000.same.safetensors", *new], new, new, ["000000.same.safetensors", *new]]


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
    finished: tuple[Path, Checkpointed], make: Make, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """One line names the file and the reason, and the run ends with the same bits."""
    run_dir, whole = tmp_path / "run", finished[1]
    shutil.copytree(finished[0], run_dir)
    broken = only_in_newest(run_dir / "checkpoints") if "adapter" in damage else "round_00003.json"
    DAMAGES[damage](run_dir / "checkpoints")
    with caplog.at_level(logging.WARNING):
        run = make(run_dir, resume=True)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("the checkpoint of round 3 is not used: ")
    assert str(broken) in message
    assert "damaged" in message or "missing" in message
    assert run.federation.progress.round_index == 2
    run.loop.run()
    assert_same(run, whole)
    assert run.federation.ledger.rows() == whole.federation.ledger.rows()
    assert run.folder.rounds() == [2, 3]


def test_when_all_are_damaged_there_is_an_error(
    finished: tuple[Path, Checkpointed], make: Make, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(finished[0], run_dir)
    for path in (run_dir / "checkpoints").glob("round_*.json"):
        flip(path, 100)
    with pytest.raises(CheckpointError, match=f"every checkpoint in {run_dir}/checkpoints is damaged"):
        make(run_dir, resume=True)


def test_a_checkpoint_that_is_asked_for_is_not_replaced_by_another(
    finished: tuple[Path, Checkpointed], make: Make, tmp_path: Path
) -> None:
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    run = make(tmp_path)
    assert run.folder.load(run.parts, 2) == 2
    assert run.federation.progress.round_index == 2
    flip(tmp_path / "checkpoints" / "round_00002.json", 50)
    with pytest.raises(CheckpointError, match=r"round_00002.json is damaged"):
        run.folder.load(run.parts, 2)
    with pytest.raises(TrainingError, match="no checkpoint of round 1"):
        run.folder.load(run.parts, 1)


def test_another_format_is_refused(finished: tuple[Path, Checkpointed], make: Make, tmp_path: Path) -> None:
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints").glob("round_*.json"):
        write_checked(path, {**read_checked(path), "format": 2})
    run = make(tmp_path)
    with pytest.raises(CheckpointError, match="has checkpoint format 2, this version of fellrec reads 3"):
        run.folder.load(run.parts, 3)


@pytest.mark.parametrize("kept", [1, 3])
def test_as_many_checkpoints_stay_as_asked_for_and_no_file_that_none_of_them_needs(
    make: Make, tmp_path: Path, kept: int
) -> None:
    run = make(tmp_path / "run", f"trainer.checkpoints_kept={kept}", "participation.rate=0.6")
    run.loop.run()
    assert run.folder.rounds() == [1, 2, 3][-kept:]
    manifests = [read_checked(path) for path in run.folder.folder.glob("round_*.json")]
    needed = {name for manifest in manifests for name in (*manifest["files"], manifest["parts"])}
    assert {path.name for path in run.folder.tensors.iterdir()} == needed
    assert len(list(run.folder.folder.iterdir())) == kept + 1, "one manifest a checkpoint, and the tensors"


def test_best_adapters_are_references_not_copies(finished: tuple[Path, Checkpointed]) -> None:
    found = states(finished[0] / "checkpoints", 3)
    assert found["selection"]["round_index"] == 2, "the last round is the best, so that there is something to share"
    assert found["selection"]["served"] == found["population"]["adapters"]


def test_another_populations_checkpoint_is_refused(
    finished: tuple[Path, Checkpointed], make: Make, tmp_path: Path
) -> None:
    run = make(tmp_path, "aggregation=centralized")
    with pytest.raises(TrainingError, match="the checkpoint has 3 clients, this run has 1"):
        CheckpointFolder(finished[0] / "checkpoints").load(run.parts)


def test_a_client_that_was_trained_from_something_else_trains_again(make: Make, tmp_path: Path) -> None:
    """Left over from another run: its file is whole, and still not used."""
    run_dir, folders = tmp_path / "run", [tmp_path / name / "checkpoints" / "tensors" for name in ("run", "other")]
    make(run_dir, "trainer.num_rounds=1").loop.run()
    run, other = make(run_dir, resume=True), make(tmp_path / "other", "seed=1", "trainer.num_rounds=1")
    other.loop.run()
    for its, folder in zip((run, other), folders, strict=True):
        its.federation.population.persist(folder)
    (theirs,) = other.loop.train([other.federation.population.job(0, 1)])
    for path in folders[1].glob("000000.*-00001.*"):
        shutil.copy(path, folders[0])
    population = run.federation.population
    assert population.recover(population.job(0, 1)) is None
    (own,) = run.loop.train([population.job(0, 1)])
    assert own.loss != theirs.loss  # type: ignore[union-attr]
    again = make(run_dir, resume=True).federation.population
    again.persist(folders[0])
    found = again.recover(again.job(0, 1))
    assert found is not None
    assert (found.loss, found.adapter.checksum) == (own.loss, own.adapter.checksum)  # type: ignore[union-attr]


def test_a_ledger_in_parts_is_the_whole_ledger(tmp_path: Path) -> None:
    whole, parts = Ledger(), Ledger()
    for round_index in range(3):
        for ledger in (whole, parts):
            for client in range(2):
                ledger.add(client, round_index, "train", "up", "adapter", 100 + round_index)
                ledger.add(client, 0, "val", "down", "scalar", 8)
        CheckpointFolder(tmp_path, keep=3).save({"ledger": parts}, round_index)
    assert parts.rows() == whole.rows()
    assert parts.total(direction="down") == 3 * 2 * 8
    assert parts.num_messages(client=1) == whole.num_messages(client=1) == 6
    assert parts.frame().to_dict("records") == whole.frame().to_dict("records")
    resumed = Ledger()
    CheckpointFolder(tmp_path).load({"ledger": resumed}, 1)
    assert resumed.total(round=2) == 0
    assert resumed.total(round=1) == 202


def test_the_files_of_a_ledger_do_not_grow_with_the_rounds(tmp_path: Path) -> None:
    """Equal rounds join as the digits of a binary counter carry: 100 is 0b1100100, three parts."""
    ledger, checkpoints = Ledger(), CheckpointFolder(tmp_path, keep=1)
    for round_index in range(100):
        for client in range(3):
            ledger.add(client, round_index, "train", "up", "adapter", 7)
        checkpoints.save({"ledger": ledger}, round_index)
    assert len(list(checkpoints.tensors.iterdir())) == 3
    resumed = Ledger()
    checkpoints.load({"ledger": resumed})
    assert resumed.rows() == [[client, n, "train", "up", "adapter", 1, 7] for client in range(3) for n in range(100)]


def test_checked_json_is_exact_and_guarded(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    value = {"b": [0.1, -float("inf"), 1e-300, None], "a": {"ü": "\n"}}
    write_checked(path, value)
    assert read_checked(path) == value
    assert list(read_checked(path)) == ["b", "a"]
    path.write_text(json.dumps({"checksum": "0", "content": value}))
    with pytest.raises(CheckpointError, match="its checksum differs"):
        read_checked(path)
