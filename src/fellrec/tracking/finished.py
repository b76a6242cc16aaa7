"""Finished runs of an MLflow store: found by id, by their comparison or by a search, and copied to a folder.

Importing MLflow takes seconds, so functions import it when they need it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fellrec.errors import ConfigError, shorten
from fellrec.functional.quoting import hydra_value
from fellrec.tracking.delivery import PARENT_TAG
from fellrec.tracking.store import make_client

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

FILES = (
    *("config.yaml", "results.json", "users.parquet", "partition.parquet", "versions.json", "finished.json"),
    *("rounds.csv", "matrices.npz"),
)
"""Artifacts of a run that are copied, as far as it has them."""
_NEEDED = ("config.yaml", "results.json", "users.parquet", "partition.parquet")
_RESULT = ("comparison/comparison.json", "comparison.json")
"""Where a comparison has its results among its artifacts."""
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_MOST_RUNS = 1000
_MOST_NAMES = 5


@dataclass
class Downloaded:
    """What was copied.

    Attributes:
        runs: Folder of each run → its name and id.
        comparisons: Folders with the ``comparison.json`` of comparisons.
    """

    runs: dict[Path, str] = field(default_factory=dict)
    comparisons: list[Path] = field(default_factory=list)


def download(words: Sequence[str], uri: str, experiment: str, folder: Path) -> Downloaded:
    """Copy what a report needs of finished runs.

    Args:
        words: Ids of runs, of comparisons, or search expressions of MLflow.
        uri: Of the store.
        experiment: In which expressions search.
        folder: Target directory.

    Raises:
        ConfigError: If the store cannot be used, a run does not exist or is not finished, or an expression is wrong or
            finds nothing.
    """
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    client = make_client(uri)
    found = Downloaded()
    runs: dict[str, Run] = {}
    for word in words:
        for run in _named(client, word, uri, experiment):
            children = _children(client, run)
            if children:
                found.comparisons += _comparison(client, run, folder)
            runs |= {one.info.run_id: one for one in children or [run]}
    _check_finished(list(runs.values()))
    for run_id, run in runs.items():
        name = f"{run.info.run_name} ({run_id[:8]})"
        found.runs[_copy(client, run, name, folder / run_id)] = name
    return found


def _named(client: MlflowClient, word: str, uri: str, experiment: str) -> list[Run]:
    """The runs that a word names; comparisons are left out of a search, which finds their runs."""
    from mlflow.exceptions import MlflowException

    option = f"tracking.uri={hydra_value(uri)}"
    if _RUN_ID.fullmatch(word):
        try:
            run = client.get_run(word)
        except MlflowException as error:
            raise ConfigError(f"{uri} has no run {word}; another store is given by tracking.uri=…") from error
        if run.info.lifecycle_stage != "active":
            raise ConfigError(f"run {word} was deleted; restore it by mlflow runs restore --run-id {word}")
        return [run]
    place = client.get_experiment_by_name(experiment)
    if place is None:
        names = [shorten(one.name, 80) for one in client.search_experiments(max_results=_MOST_NAMES)]
        raise ConfigError(
            f"{option} has no experiment {experiment}; give tracking.experiment=…, such as {', '.join(names)}"
        )
    try:
        found = client.search_runs([place.experiment_id], word, max_results=_MOST_RUNS)
    except MlflowException as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ConfigError(
            f"{word!r} is not a search expression of MLflow: {reason}; an example: \"tags.rule = 'fedavg'\""
        ) from error
    runs = [run for run in found if run.data.tags.get("kind") != "comparison"]
    if not runs:
        raise ConfigError(f"no run of experiment {experiment} in {uri} fits {word!r}")
    return runs


def _children(client: MlflowClient, run: Run) -> list[Run]:
    """The runs of a comparison; none for a run."""
    expression = f"tags.`{PARENT_TAG}` = '{run.info.run_id}'"
    order = ["attributes.start_time ASC"]
    return list(client.search_runs([run.info.experiment_id], expression, max_results=_MOST_RUNS, order_by=order))


def _check_finished(runs: Sequence[Run]) -> None:
    """Refuse runs that have no results yet, or never will."""
    going = [run for run in runs if run.info.status in ("RUNNING", "SCHEDULED")]
    others = [run for run in runs if run.info.status in ("FAILED", "KILLED")]
    if going:
        raise ConfigError(f"not finished: {_names(going)}; wait for them, or give the finished runs alone")
    if others:
        raise ConfigError(
            f"not finished: {_names(others)}; resume them by fellrec train resume=RUN_DIR, or give the finished "
            "runs alone"
        )


def _names(runs: Sequence[Run]) -> str:
    names = [f"{shorten(str(run.info.run_name), 80)} ({run.info.run_id}, {run.info.status})" for run in runs]
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return f"{', '.join(names[:_MOST_NAMES])}{more}"


def _copy(client: MlflowClient, run: Run, name: str, folder: Path) -> Path:
    folder.mkdir()
    run_id = run.info.run_id
    present = {item.path for item in client.list_artifacts(run_id)}
    missing = [file for file in _NEEDED if file not in present]
    if missing:
        raise ConfigError(
            f"run {name} has no {', '.join(missing)} among its artifacts: it is not a run of fellrec, or made with "
            "~callbacks.outputs"
        )
    for file in FILES:
        if file in present:
            client.download_artifacts(run_id, file, str(folder))
    (folder / "data.json").write_text(json.dumps(_data(run)))
    return folder


def _data(run: Run) -> dict[str, Any]:
    """The data set of a run, as in its ``data.json``."""
    inputs = run.inputs.dataset_inputs if run.inputs is not None else []
    if not inputs:
        return {"key": None, "name": run.data.tags.get("data", ""), "statistics": {}}
    data = inputs[0].dataset
    return {"key": data.digest, "name": data.name, "statistics": json.loads(data.profile or "{}")}


def _comparison(client: MlflowClient, run: Run, folder: Path) -> list[Path]:
    """The folder with the results of a comparison; none if it has none, as its runs were resumed alone."""
    target = folder / f"comparison-{run.info.run_id}"
    target.mkdir()
    for path in _RESULT:
        parent = path.rpartition("/")[0] or None
        if path in {item.path for item in client.list_artifacts(run.info.run_id, parent)}:
            found = Path(client.download_artifacts(run.info.run_id, path, str(target)))
            return [found.parent]
    return []
