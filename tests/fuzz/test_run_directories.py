"""Damaged run directories: what reads them gives the same figures, or one clear error, in bounded time."""

from __future__ import annotations

import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz.mutations import changed, damaged, inputs
from fuzz.test_caches import SMALL

from fellrec.cli.evaluate import evaluate
from fellrec.cli.main import main
from fellrec.cli.train import resumed
from fellrec.errors import FellrecError
from fellrec.federated.checkpoint import CHECKPOINTS, CheckpointFolder
from fellrec.report.export import export

LONGEST_SECONDS = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run."""
    folder = tmp_path_factory.mktemp("runs")
    options = ("backbone=sasrec", "backbone.hidden_size=8", "backbone.num_layers=2", "split.head_layers=0")
    rounds = ("aggregation=fedavg", "trainer.num_rounds=2", "references.show=[]")
    places = (f"run_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}", f"tracking.uri=sqlite:///{folder / 'm.db'}")
    main(["train", *SMALL, *options, *rounds, *places])
    return folder / "run"


@contextmanager
def limited() -> Iterator[None]:
    """A reader that hangs fails the test."""

    def stop(*_: object) -> None:
        raise AssertionError(f"a damaged run directory took more than {LONGEST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damage(file: Path, source: random.Random) -> None:
    """Change bytes of a file; of a configuration, mostly one of its values; or remove it."""
    if source.random() < 0.05:
        file.unlink()
    elif file.suffix == ".yaml" and source.random() < 0.7:
        file.write_text(yaml.safe_dump(changed(yaml.safe_load(file.read_text()), source)))
    else:
        file.write_bytes(damaged(file.read_bytes(), source))


def outcomes(
    whole: Path,
    tmp_path: Path,
    patterns: Sequence[str],
    count: int,
    read: Callable[[Path], Any],
    may_differ: bool = False,
) -> Counter[str]:
    """Damage one file again and again and read the directory.

    Args:
        whole: The run.
        tmp_path: For copies.
        patterns: Of the files.
        count: Damaged directories.
        read: Reads what is compared.
        may_differ: Whether the files have no checksum, so that a changed value is a value.
    """
    expected, found = read(whole), Counter[str]()
    names = sorted(path.relative_to(whole) for pattern in patterns for path in whole.glob(pattern))
    for number, source in enumerate(inputs(count)):
        run_dir = tmp_path / str(number) / "run"
        shutil.copytree(whole, run_dir)
        damage(run_dir / source.choice(names), source)
        try:
            with limited():
                result = read(run_dir)
            assert may_differ or result == expected, f"other figures, input {number}"
            found["same" if result == expected else "other"] += 1
        except FellrecError as error:
            found["refused" if str(error) else "refused without a message"] += 1
        shutil.rmtree(run_dir.parent)
    print(patterns, dict(found))
    assert not found["refused without a message"]
    return found


def figures(run_dir: Path) -> dict[str, Any]:
    (result, *_) = evaluate(run_dir, "test").results
    return dict(result.evaluation.summary)


def test_damaged_checkpoints_give_the_same_figures_or_are_refused(whole: Path, tmp_path: Path) -> None:
    """One of the last two checkpoints is damaged, so the other is used, whose best adapters may be those before."""
    files = ("checkpoints/round_*.json", "checkpoints/tensors/*", "data.json", "versions.json")
    found = outcomes(whole, tmp_path, files, 20, figures, may_differ=True)
    assert found["same"] + found["other"] > 0


def test_a_checkpoint_is_whole_or_not_listed(whole: Path, tmp_path: Path) -> None:
    """All rounds, or fewer: what is listed has its checksums."""

    def rounds(run_dir: Path) -> int:
        return len(CheckpointFolder(run_dir / CHECKPOINTS).rounds())

    assert rounds(whole) == 2
    found = outcomes(
        whole, tmp_path, ("checkpoints/round_*.json", "checkpoints/tensors/*"), 100, rounds, may_differ=True
    )
    assert found["refused"] == 0
    assert found["other"] > 50


def test_damaged_configurations_are_read_or_refused(whole: Path, tmp_path: Path) -> None:
    found = outcomes(whole, tmp_path, ("config.yaml",), 60, lambda run: dict(resumed([], run)).keys(), may_differ=True)
    assert found["refused"] > 0


def test_damaged_tables_are_exported_or_refused(whole: Path, tmp_path: Path) -> None:
    def exported(run_dir: Path) -> int:
        return len(export(run_dir, "ranx", run_dir / "export"))

    found = outcomes(whole, tmp_path, ("*.parquet",), 60, exported)
    assert found["refused"] > 0
