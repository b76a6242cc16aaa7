"""Damaged run directories: what reads them gives the same figures, or one clear error, in bounded time."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz.mutations import changed, damaged, inputs
from fuzz.outcomes import OK, REFUSED, Outcomes
from fuzz.test_caches import SMALL

from fellrec.cli.evaluate import evaluate
from fellrec.cli.main import main
from fellrec.experiment.resume import resumed
from fellrec.federated.checkpoint import CHECKPOINTS, CheckpointFolder
from fellrec.report.export import export
from fellrec.state.inside import check_inside
from fellrec.tracking.delivery import OutboxClient

LONGEST_SECONDS = 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small finished run."""
    folder = tmp_path_factory.mktemp("runs")
    options = ("backbone=sasrec", "backbone.hidden_size=8", "backbone.num_layers=2", "split.head_layers=0")
    rounds = ("aggregation=fedavg", "trainer.num_rounds=2", "references.show=[]")
    places = (f"run_dir={folder / 'run'}", f"cache_dir={folder / 'cache'}", f"tracking.uri=sqlite:///{folder / 'm.db'}")
    main(["train", *SMALL, *options, *rounds, *places])
    return folder / "run"


def damage(file: Path, source: random.Random) -> None:
    """Change bytes of a file; of a configuration, mostly one of its values; or replace or remove it."""
    if source.random() < 0.1:
        file.unlink()
        replacement = source.choice((None, "/etc/passwd", "nothing", ".", "pipe", "folder"))
        if replacement == "pipe":
            os.mkfifo(file)
        elif replacement == "folder":
            file.mkdir()
        elif replacement:
            file.symlink_to(replacement)
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
    expected = read(whole)
    names = sorted(path.relative_to(whole) for pattern in patterns for path in whole.glob(pattern))
    with Outcomes(f"run directories, {read.__name__}", LONGEST_SECONDS) as found:
        for number, source in enumerate(inputs(count)):
            run_dir = tmp_path / str(number) / "run"
            shutil.copytree(whole, run_dir)
            name = source.choice(names)
            damage(run_dir / name, source)

            def check(result: Any) -> str:
                assert may_differ or result == expected, "other figures"
                return OK if result == expected else "other"

            found.of(lambda run_dir=run_dir: read(run_dir), (number, name), check)
            shutil.rmtree(run_dir.parent)
    return found.found


def figures(run_dir: Path) -> dict[str, Any]:
    (result, *_) = evaluate(run_dir, "test").results
    return dict(result.evaluation.summary)


def test_damaged_checkpoints_give_the_same_figures_or_are_refused(whole: Path, tmp_path: Path) -> None:
    """One of the last two checkpoints is damaged, so the other is used, whose best adapters may be those before."""
    files = ("checkpoints/round_*.json", "checkpoints/tensors/*", "data.json", "versions.json")
    found = outcomes(whole, tmp_path, files, 20, figures, may_differ=True)
    assert found[OK] + found["other"] > 0


def test_a_checkpoint_is_whole_or_not_listed(whole: Path, tmp_path: Path) -> None:
    """All rounds, or fewer: what is listed has its checksums. Links and pipes are refused before, see `read_config`."""

    def rounds(run_dir: Path) -> int:
        check_inside(run_dir)
        return len(CheckpointFolder(run_dir / CHECKPOINTS).rounds())

    assert rounds(whole) == 2
    found = outcomes(
        whole, tmp_path, ("checkpoints/round_*.json", "checkpoints/tensors/*"), 100, rounds, may_differ=True
    )
    assert found[REFUSED] < 15
    assert found["other"] > 50


def test_damaged_configurations_are_read_or_refused(whole: Path, tmp_path: Path) -> None:
    def settings(run_dir: Path) -> dict[Any, Any]:
        return dict(resumed([], run_dir))

    found = outcomes(whole, tmp_path, ("config.yaml",), 60, settings, may_differ=True)
    assert found[REFUSED] > 0


def test_damaged_tables_are_exported_or_refused(whole: Path, tmp_path: Path) -> None:
    def exported(run_dir: Path) -> int:
        return len(export(run_dir, "ranx", run_dir / "export"))

    found = outcomes(whole, tmp_path, ("*.parquet",), 60, exported)
    assert found[REFUSED] > 0


def test_damaged_outboxes_are_sent_or_refused(whole: Path, tmp_path: Path, empty_store: Path) -> None:
    def sent(run_dir: Path) -> int:
        store = shutil.copy(empty_store, run_dir.parent / "mlflow.db")
        return OutboxClient(run_dir / "outbox", f"sqlite:///{store}").send()

    copy = tmp_path / "whole" / "run"
    shutil.copytree(whole, copy)
    found = outcomes(copy, tmp_path, ("outbox/*.json*",), 30, sent, may_differ=True)
    assert found[REFUSED] > 0
