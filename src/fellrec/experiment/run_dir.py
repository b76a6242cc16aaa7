"""The run directory: the files that a run writes."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig

from fellrec.config.stored import to_yaml
from fellrec.data.guards import check_template
from fellrec.data.prepared import PreparedData
from fellrec.errors import ConfigError
from fellrec.federated.checkpoint import CHECKPOINTS, CheckpointFolder
from fellrec.models.fingerprint import differences
from fellrec.models.module import Objective
from fellrec.state.files import write_atomically, write_json, write_parquet
from fellrec.state.lock import is_lock
from fellrec.state.run_folder import CONFIG
from fellrec.types import Evaluation

SLURM_FOLDER = "slurm"
"""Subdirectory for the scripts and output of a run's SLURM jobs, see ``fellrec submit``."""
_RESULTS = "results.json"
_VERSIONS = "versions.json"
_BACKBONE = "backbone.json"
_THREADS = "num_threads"
_PACKAGES = ("fellrec", "torch", "lightning", "transformers", "peft", "torchmetrics", "hydra-core", "mlflow")

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


def write_start(run_dir: Path, config: DictConfig, data: PreparedData, prompt: Mapping[str, str]) -> None:
    """Write what defines the run: resolved configuration, versions, data statistics, partition.

    Args:
        run_dir: Of the run.
        config: Resolved.
        data: The prepared data set.
        prompt: Versions of the objective's texts, see ``Objective.metadata``.
    """
    write_atomically(run_dir / CONFIG, to_yaml(config).encode())
    write_json(run_dir / _VERSIONS, {**versions(), **prompt})
    write_json(run_dir / "data.json", {"key": data.key, "name": data.name, "statistics": data.statistics})
    partition = pd.DataFrame({"user_id": data.users["user_id"], "client": data.client_of_user})
    write_parquet(run_dir / "partition.parquet", partition)


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
            "(data.root=… gives another folder)"
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
    results = {"stage": evaluation.stage, "round_index": evaluation.round_index, **extra}
    write_json(run_dir / _RESULTS, {**results, "summary": summary, "per_client": per_client})


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect results, fellrec's own commit, and the number of threads."""
    found = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), **found, "git_commit": git_commit(), _THREADS: num_threads()}


def num_threads() -> str:
    """The number of threads of this process; the order of sums, and so their last bits, depend on it."""
    return str(torch.get_num_threads())


def note_threads(run_dir: Path) -> None:
    """Warn if a run is resumed with another number of threads than it had, and record the number in ``versions.json``.

    As for the type of a device, the run is not refused: its results are valid, but not the same bits.
    """
    path = run_dir / _VERSIONS
    recorded = _read_json(path) if path.is_file() else {}
    before, now = str(recorded.get(_THREADS, num_threads())).rpartition(" then ")[2], num_threads()
    if now != before:
        log.warning(
            "%s had %s threads until now, and has %s: its results are not the same bits as without the stop; "
            "OMP_NUM_THREADS=%s keeps the number",
            *(run_dir, before, now, before),
        )
        write_json(path, {**recorded, _THREADS: f"{recorded[_THREADS]} then {now}"})


def git_commit() -> str:
    """The commit of fellrec itself: of its checkout, or recorded by pip for an installation from a repository.

    ``unknown`` for a release; the repository that the user is in, or that has the environment, does not count.
    """
    source = Path(__file__).resolve().parents[2]  # src, or site-packages
    installed = json.loads(distribution("fellrec").read_text("direct_url.json") or "{}").get("vcs_info", {})
    if source.name != "src":
        return str(installed.get("commit_id", "unknown"))
    command = ["git", "-C", str(source), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    top, _, commit = done.stdout.strip().partition("\n")
    return commit if done.returncode == 0 and Path(top).resolve() == source.parent else "unknown"
