"""The run directory: the files that a run writes."""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig

from fellrec.config.stored import to_yaml
from fellrec.data.guards import check_template
from fellrec.data.prepared import PreparedData
from fellrec.errors import ConfigError
from fellrec.experiment.versions import NUM_THREADS, versions
from fellrec.federated.checkpoint import CHECKPOINTS, CheckpointFolder
from fellrec.functional.secrets import redact
from fellrec.models.fingerprint import differences
from fellrec.models.module import Objective
from fellrec.report.provenance import THEN, Provenance
from fellrec.state.files import private_files, write_atomically, write_json, write_parquet
from fellrec.state.lock import is_lock
from fellrec.state.run_folder import CONFIG
from fellrec.types import Evaluation

SLURM_FOLDER = "slurm"
"""Subdirectory for the scripts and output of a run's SLURM jobs, see ``fellrec submit``."""
_RESULTS = "results.json"
_VERSIONS = "versions.json"
_BACKBONE = "backbone.json"
_LONGEST_VERSION = 2000

log = logging.getLogger(__name__)


def free_run_dir(requested: str | None, label: str) -> Path:
    """Choose a run directory.

    Args:
        requested: The user's ``run_dir``, or ``None`` for ``runs/<time>-<label>``.
        label: Data set, rule and seed.

    Raises:
        ConfigError: If the directory exists and is not empty: nothing is overwritten.
    """
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path(requested) if requested else Path("runs") / f"{stamp}-{label}"
    number = 1
    while not requested and folder.exists():
        number += 1
        folder = Path("runs") / f"{stamp}-{label}-{number}"
    check_new(folder)
    return folder


def new_run_dir(requested: str | None, label: str) -> Path:
    """Create the run directory, which only the user can read; see `free_run_dir`.

    Raises:
        ConfigError: If it is not empty or cannot be created.
    """
    folder = free_run_dir(requested, label)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(PermissionError):  # of another user, who decides
            folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"run_dir={folder} cannot be created: {error}") from error
    return folder.resolve()


def check_new(folder: Path) -> None:
    """Check that a run directory is empty; in a SLURM job, its own script and output do not count.

    Raises:
        ConfigError: If it is not.
    """
    if folder.exists() and (not folder.is_dir() or any(not _is_around_run(path) for path in folder.iterdir())):
        raise ConfigError(
            f"run_dir={folder} exists and is not empty; choose another, or resume it with resume={folder}"
        )


def _is_around_run(path: Path) -> bool:
    return is_lock(path) or (path.name == SLURM_FOLDER and "SLURM_JOB_ID" in os.environ)


def write_start(run_dir: Path, config: DictConfig, data: PreparedData, origin: Mapping[str, str]) -> None:
    """Write what defines the run: resolved configuration, versions, data statistics, partition.

    Args:
        run_dir: Of the run.
        config: Resolved.
        data: The prepared data set.
        origin: Versions of the objective's texts, see ``Objective.metadata``, and what the backbone was converted from.
    """
    write_atomically(run_dir / CONFIG, to_yaml(config).encode())
    write_facts(run_dir, data, origin)
    partition = pd.DataFrame({"user_id": data.users["user_id"], "client": data.client_of_user})
    write_parquet(run_dir / "partition.parquet", partition)


def write_facts(run_dir: Path, data: PreparedData, origin: Mapping[str, str] | None = None) -> None:
    """Write what a resume compares: versions, and the fingerprint of the data. A comparison has them too."""
    write_json(run_dir / _VERSIONS, {**versions(), **(origin or {})})
    write_json(run_dir / "data.json", {"key": data.key, "name": data.name, "statistics": data.statistics})


def write_command(run_dir: Path, arguments: Sequence[str]) -> None:
    """Add a command line to ``command.txt``, without passwords: that of the start, and one for each resume."""
    path = run_dir / "command.txt"
    before = path.read_bytes() if path.is_file() else b""
    with private_files():
        write_atomically(path, before + redact(f"fellrec {shlex.join(arguments)}\n").encode())


def first_command(run_dir: Path) -> list[str]:
    """The words after ``fellrec`` that a run or a comparison was started with; empty if they are not known."""
    path = run_dir / "command.txt"
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    try:
        return shlex.split(lines[0])[1:] if lines else []
    except ValueError:  # it was edited
        return []


def check_finished(run_dir: Path, num_rounds: int) -> None:
    """Check that a run to evaluate has been trained to its end, and has checkpoints.

    Args:
        run_dir: Of the run.
        num_rounds: ``trainer.num_rounds``; a run with results may have ended before.

    Raises:
        ConfigError: Saying how to finish it, or what there is instead of checkpoints.
    """
    folder = CheckpointFolder(run_dir / CHECKPOINTS)
    if not any(folder.folder.glob("round_*.json")):
        raise ConfigError(
            f"{run_dir} has no checkpoint, and nothing to evaluate: it was stopped before its first, or made with "
            f"~callbacks.checkpoint; a finished run has its figures in {_RESULTS}"
        )
    if (run_dir / _RESULTS).is_file():
        return
    rounds = folder.rounds()
    if rounds and rounds[-1] < num_rounds:
        raise ConfigError(
            f"{run_dir}: round {rounds[-1]} of {num_rounds}, not finished; resume it: fellrec train resume={run_dir}"
        )


def check_prompt(run_dir: Path, objective: Objective) -> None:
    """Check that a run to resume or evaluate has the prompt that it was trained with.

    Raises:
        ConfigError: If the objective's texts have changed.
    """
    recorded = _read_json(run_dir / _VERSIONS) if (run_dir / _VERSIONS).is_file() else {}
    check_template({name: recorded.get(name) for name in objective.metadata}, objective.metadata, str(run_dir))


def check_same_data(run_dir: Path, data: PreparedData) -> None:
    """Check that a run to resume or evaluate has the data that it was trained with, wherever they are now.

    Raises:
        ConfigError: If the data or their preparation have changed, or ``data.json`` is damaged.
    """
    path = run_dir / "data.json"
    trained_on = _read_json(path).get("key")
    if trained_on != data.key:
        raise ConfigError(
            f"the data changed since {run_dir} was trained: their key was {trained_on} and is now {data.key} "
            "(data.root=… or data.path=… gives other files)"
        )


def _read_json(path: Path) -> dict[str, Any]:
    """A mapping in a file of the run directory.

    Raises:
        ConfigError: If it cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged: it is not a mapping")
    return found


def write_backbone(run_dir: Path, fingerprint: Mapping[str, Any]) -> None:
    """Write the fingerprint of the backbone that a run begins with, for `check_backbone`."""
    write_json(run_dir / _BACKBONE, dict(fingerprint))


def check_backbone(run_dir: Path, fingerprint: Mapping[str, Any], name: str) -> None:
    """Check that a run to resume or evaluate has the backbone that it was trained with.

    Args:
        run_dir: Of the run.
        fingerprint: Of the backbone now.
        name: What the backbone is called, for the message.

    Raises:
        ConfigError: If its configuration, its tokenizer or a weight differs.
    """
    path = run_dir / _BACKBONE
    if not path.is_file():
        return
    try:
        differing = differences(_read_json(path), fingerprint)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
    if differing:
        raise ConfigError(f"{run_dir} was trained with another backbone than this {name}; they differ in {differing}")


def write_evaluation(run_dir: Path, evaluation: Evaluation, extra: Mapping[str, Any]) -> None:
    """Write ``results.json``: the figures of a stage."""
    per_client = {name: values.tolist() for name, values in evaluation.per_client.items()}
    summary = dict(evaluation.summary)
    poisoned = {"poisoned_clients": list(evaluation.poisoned)} if evaluation.poisoned else {}
    results = {"stage": evaluation.stage, "round_index": evaluation.round_index, **poisoned, **extra}
    write_json(run_dir / _RESULTS, {**results, "summary": summary, "per_client": per_client})


def note_versions(run_dir: Path) -> None:
    """Warn if a run is resumed with other versions or another number of threads, and record them in ``versions.json``.

    As for the type of a device, the run is not refused: its results are valid, but not the same bits.
    """
    path, recorded, present = run_dir / _VERSIONS, _recorded_versions(run_dir), versions()
    before = {name: recorded[name].rpartition(THEN)[2] for name in present if name in recorded}
    changed = {name: now for name, now in present.items() if before.get(name, now) != now}
    if not changed:
        return
    log.warning(
        "%s was trained with %s until now: its results are not the same bits as without the stop%s",
        run_dir,
        ", ".join(f"{name} {before[name]} (now {now})" for name, now in changed.items()),
        f"; OMP_NUM_THREADS={before[NUM_THREADS]} keeps the number of threads" if NUM_THREADS in changed else "",
    )
    both = {name: f"{recorded[name]}{THEN}{now}" for name, now in changed.items()}
    write_json(path, {**_read_json(path), **both})


def provenance(run_dir: Path | None = None) -> Provenance:
    """What results of this process are measured with.

    Args:
        run_dir: Of the run whose adapters are evaluated: a value with which it was trained and that is another now
            comes first. ``None`` if this process trained them.
    """
    recorded = {} if run_dir is None else _recorded_versions(run_dir)
    found = {}
    for name, now in versions().items():
        before = recorded.get(name, now)
        found[name] = before if before.rpartition(THEN)[2] == now else f"{before}{THEN}{now}"
    return Provenance.of(found)


def _recorded_versions(run_dir: Path) -> dict[str, str]:
    """What ``versions.json`` says; the file may come from someone else, so only short values that can be printed."""
    path = run_dir / _VERSIONS
    found = _read_json(path) if path.is_file() else {}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, str) and value.isprintable() and len(value) <= _LONGEST_VERSION
    }
