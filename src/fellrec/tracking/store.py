"""The MLflow store: loggers for runs, a parent run for comparisons, the command of the UI.

MLflow takes seconds to import, so it is imported where it is needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fellrec.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch.loggers import MLFlowLogger
    from mlflow.tracking import MlflowClient

_PARENT_TAG = "mlflow.parentRunId"
_SQLITE = b"SQLite format 3\0"
"""What a database file begins with."""


def make_client(uri: str) -> MlflowClient:
    """A client whose first answer shows that the store can be used.

    Raises:
        ConfigError: If the store does not answer within seconds.
    """
    _check_file(uri)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow.tracking import MlflowClient

    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # MLflow, SQLAlchemy and requests each raise their own
        raise ConfigError(f"tracking.uri={uri} cannot be used: {str(error).splitlines()[0]}") from error
    return client


def check_reachable(uri: str) -> None:
    """Refuse a store that cannot be used; a new sqlite file is made only when it is needed.

    Raises:
        ConfigError: See above.
    """
    path = _sqlite_path(uri)
    if path is None or path.exists():
        make_client(uri)
    else:
        _check_file(uri)


def ensure_experiment(uri: str, name: str) -> str:
    """The experiment's id; a new one keeps its artefacts beside a sqlite store, whatever the current folder is."""
    client = make_client(uri)
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    return str(client.create_experiment(name, artifact_location=_artifact_location(uri)))


def make_logger(
    uri: str, experiment: str, run_name: str, tags: Mapping[str, str], run_id: str | None = None
) -> MLFlowLogger:
    """Lightning's logger on the store.

    Args:
        uri: MLflow tracking URI.
        experiment: Name of the experiment; made if absent.
        run_name: Shown in the UI.
        tags: Of the run.
        run_id: Go on with this run.

    Raises:
        ConfigError: If the store cannot be used or does not hold the run to go on with.
    """
    ensure_experiment(uri, experiment)
    if run_id is not None:
        _check_run(uri, run_id)
    from lightning.pytorch.loggers import MLFlowLogger

    return MLFlowLogger(experiment_name=experiment, run_name=run_name, tracking_uri=uri, tags=dict(tags), run_id=run_id)


@contextmanager
def parent_run(uri: str, experiment: str, run_name: str, tags: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Open the run that groups a comparison; it is closed as finished, failed or killed.

    Yields:
        The run's id and a client of the store.
    """
    experiment_id = ensure_experiment(uri, experiment)
    client = make_client(uri)
    run_id = client.create_run(experiment_id, tags=dict(tags), run_name=run_name).info.run_id
    status = "FINISHED"
    try:
        yield run_id, client
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except BaseException:
        status = "FAILED"
        raise
    finally:
        client.set_terminated(run_id, status)


def child_tags(parent_run_id: str | None) -> dict[str, str]:
    """The tags that put a run below its parent in the UI."""
    return {} if parent_run_id is None else {_PARENT_TAG: parent_run_id}


def ui_command(uri: str, host: str, port: int) -> list[str]:
    """The command that serves the UI."""
    return [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", host, "--port", str(port),
        *(["--default-artifact-root", location] if (location := _artifact_location(uri)) else []),
    ]  # fmt: skip


def _artifact_location(uri: str) -> str | None:
    """Beside a sqlite file; elsewhere the server decides."""
    path = _sqlite_path(uri)
    return None if path is None else (path.parent / "mlartifacts").as_uri()


def _sqlite_path(uri: str) -> Path | None:
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None


def _check_run(uri: str, run_id: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        make_client(uri).get_run(run_id)
    except MlflowException as error:
        raise ConfigError(
            f"tracking.uri={uri} does not hold run {run_id}: {str(error).splitlines()[0]}; "
            "resume from the folder that the run was started in"
        ) from error


def _begins_with(path: Path, start: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(start)) == start


def _check_file(uri: str) -> None:
    """MLflow would try for minutes to open a sqlite file that cannot be opened, and write into a short other file."""
    path = _sqlite_path(uri)
    if path is None:
        return
    if path.is_file() and path.stat().st_size and not _begins_with(path, _SQLITE):
        raise ConfigError(f"tracking.uri={uri} cannot be used: {path} is no sqlite database")
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if path.is_dir() or not os.access(existing, os.W_OK) or (existing != path and not existing.is_dir()):
        raise ConfigError(
            f"tracking.uri={uri} cannot be used: {path} must be a file in a folder that can be written, "
            "such as tracking.uri=sqlite:///mlflow.db"
        )
