"""A disk that fills up or turns read-only in mid-run: a message, no half-written file, and the run goes on afterwards."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.config.compose import compose
from fellrec.errors import StorageError
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import build_federation
from fellrec.experiment.run_dir import write_evaluation
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.checkpoint import CHECKPOINTS, TENSORS, CheckpointFolder
from fellrec.federated.loop import FederatedLoop
from fellrec.state.tensor_store import check_file

SIZE = 24 << 20


@pytest.fixture(scope="module")
def recommender(tiny_overrides: list[str]) -> Recommender:
    config = compose(tiny_overrides)
    return build_recommender(config, build_data(config))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 24 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"root cannot mount a file system here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Trouble(FederatedCallback):
    """Does something at the ``number``-th time a hook is called."""

    def __init__(self, hook: str, number: int, act: Any) -> None:
        self.left = number

        def count(*records: object) -> None:
            self.left -= 1
            if self.left == 0:
                act()

        setattr(self, hook, count)


def new_loop(
    recommender: Recommender, overrides: list[str], run_dir: Path, *callbacks: FederatedCallback, resume: bool = False
) -> FederatedLoop:
    run_dir.mkdir(exist_ok=True)
    federation = build_federation(compose([*overrides, "trainer.num_rounds=3"]), recommender)
    checkpoint = Checkpoint(run_dir, federation.persisted, federation.population)
    if resume:
        checkpoint.resume()
    return federation.loop([*callbacks, checkpoint])


@pytest.fixture(scope="module")
def whole(
    recommender: Recommender, tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    loop = new_loop(recommender, tiny_overrides, tmp_path_factory.mktemp("whole") / "run")
    loop.run()
    return loop.population.bank.tensors


def assert_nothing_half(run_dir: Path) -> None:
    """Every file there is whole, and no draft is left."""
    folder = run_dir / CHECKPOINTS
    for path in (folder / TENSORS).iterdir():
        assert not path.name.startswith(".")
        check_file(path)
    assert CheckpointFolder(folder).rounds() == sorted(int(p.stem[-5:]) for p in folder.glob("round_*.json"))


@pytest.mark.parametrize(
    ("hook", "number", "left"),
    [
        pytest.param("on_client_start", 2, 5_000, id="while a client is saved"),
        pytest.param("on_client_start", 5, 100_000, id="while another is saved"),
        pytest.param("on_aggregate_start", 2, 40_000, id="while mixed adapters are saved"),
        pytest.param("on_round_end", 2, 1_000, id="while the manifest is saved"),
        pytest.param("on_round_end", 2, 0, id="to the last byte"),
    ],
)
def test_a_full_disk_ends_the_run_with_a_message_and_it_goes_on_when_there_is_room(
    disk: Path,
    recommender: Recommender,
    tiny_overrides: list[str],
    whole: dict[str, torch.Tensor],
    hook: str,
    number: int,
    left: int,
) -> None:
    ballast, run_dir = disk / "ballast", disk / "run"

    def fill() -> None:
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        with ballast.open("wb") as file:
            file.write(bytes(max(0, free - left)))

    # A full disk is not a client's failure: on_failure=skip must not hide it.
    settings = [*tiny_overrides, "participation.on_failure=skip"]
    loop = new_loop(recommender, settings, run_dir, Trouble(hook, number, fill))
    with pytest.raises(StorageError, match=rf"cannot write {run_dir}/.*: No space left on device; 0\.\d MB are free"):
        loop.run()
    assert_nothing_half(run_dir)
    ballast.unlink()
    again = new_loop(recommender, settings, run_dir, resume=True)
    again.run()
    for name, tensor in again.population.bank.tensors.items():
        assert torch.equal(tensor, whole[name])


def test_a_run_that_cannot_fit_is_refused_before_it_starts(
    disk: Path, recommender: Recommender, tiny_overrides: list[str]
) -> None:
    (disk / "ballast").write_bytes(bytes(SIZE - 200_000))
    loop = new_loop(recommender, tiny_overrides, disk / "run")
    with pytest.raises(StorageError, match=rf"3 clients with an adapter of .* need about .* GB in {disk}/run, where"):
        loop.run()
    assert list((disk / "run").iterdir()) == []


@pytest.mark.parametrize("hook", ["on_client_start", "on_aggregate_start", "on_round_end"])
def test_a_disk_that_turns_read_only_leaves_the_last_checkpoint(
    disk: Path, recommender: Recommender, tiny_overrides: list[str], whole: dict[str, torch.Tensor], hook: str
) -> None:
    run_dir = disk / "run"
    remount = lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)  # noqa: E731
    loop = new_loop(recommender, tiny_overrides, run_dir, Trouble(hook, 2, lambda: remount("ro")))
    with pytest.raises(StorageError, match=rf"cannot write {run_dir}/.*: Read-only file system"):
        loop.run()
    assert_nothing_half(run_dir)
    reader = new_loop(recommender, tiny_overrides, run_dir, resume=True)  # reading asks for nothing more
    evaluation = reader.evaluate(reader.selection.score_jobs(), "val", 0)
    assert evaluation.summary["ndcg_at_10/mean"] == reader.selection.value
    with pytest.raises(StorageError, match="Read-only file system"):
        reader.run()
    with pytest.raises(StorageError, match=rf"cannot write {run_dir}/results\.json: Read-only file system"):
        write_evaluation(run_dir, evaluation, {})
    remount("rw")
    again = new_loop(recommender, tiny_overrides, run_dir, resume=True)
    again.run()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in again.population.bank.tensors.items())


def test_results_are_written_whole_or_not_at_all(
    disk: Path, recommender: Recommender, tiny_overrides: list[str]
) -> None:
    loop = new_loop(recommender, tiny_overrides, disk / "run")
    evaluation = loop.run().evaluation
    write_evaluation(disk / "run", evaluation, {})
    before = {path.name: path.read_bytes() for path in (disk / "run").iterdir() if path.is_file()}
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    (disk / "ballast").write_bytes(bytes(free))
    with pytest.raises(StorageError, match="No space left on device"):
        write_evaluation(disk / "run", evaluation, {"more": list(range(10_000))})
    assert {path.name: path.read_bytes() for path in (disk / "run").iterdir() if path.is_file()} == before


def test_a_run_directory_that_is_not_ours_is_named(
    tmp_path: Path, recommender: Recommender, tiny_overrides: list[str]
) -> None:
    """By its mode where that binds; root is bound by nothing but a file in the folder's place."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    if os.geteuid() == 0:
        (run_dir / "checkpoints").write_text("")
    else:
        run_dir.chmod(0o555)
    loop = new_loop(recommender, tiny_overrides, run_dir)
    with pytest.raises(StorageError, match=rf"cannot write {run_dir}/checkpoints.*(Not a directory|Permission denied)"):
        loop.run()
