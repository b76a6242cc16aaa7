"""The MLflow tracking store: clients, checks, experiments, the command of the UI.

Importing MLflow takes seconds, so functions import it when they need it.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fellrec.errors import ConfigError

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_SQLITE_PREFIX = "sqlite:///"
_SQLITE = b"SQLite format 3\0"
"""First bytes of a database file."""
_GATEWAY_ERRORS = (502, 503, 504)
"""HTTP status codes of a proxy whose server is unreachable."""

_log = logging.getLogger(__name__)
_creation = threading.Lock()
"""Only one thread creates the database; MLflow's own check of the tables is not thread-safe."""


def connect(uri: str) -> MlflowClient:
    """Create a client without sending a request.

    MLflow's own retries are switched off: if only the response was lost, a retry would create a run twice. The outbox
    retries instead, and looks for the run first.
    """
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output has the results only
    from mlflow.tracking import MlflowClient

    _make_sqlite(uri)
    return MlflowClient(tracking_uri=uri)


def make_client(uri: str) -> MlflowClient:
    """Create a client and send a first request.

    Raises:
        ConfigError: If the store cannot be used or does not answer within seconds.
    """
    _check_file(uri)
    try:
        client = connect(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # MLflow, SQLAlchemy and requests raise different types
        raise ConfigError(f"tracking.uri={uri} cannot be used: {str(error).splitlines()[0]}") from error
    return client


def check_reachable(uri: str, may_be_away: bool = False) -> None:
    """Check that the store can be used, without creating a new sqlite file.

    Args:
        uri: MLflow tracking URI.
        may_be_away: Whether an unreachable server only causes a warning. A server that responds with an error is an
            error in any case.

    Raises:
        ConfigError: If the store cannot be used.
    """
    path = _sqlite_path(uri)
    if path is not None and not path.exists():
        _check_file(uri)
        return
    try:
        make_client(uri)
    except ConfigError as error:
        if not (_may_be_a_server(uri) and error.__cause__ and _is_unreachable(error.__cause__)):
            raise
        if not may_be_away:
            raise ConfigError(f"{error}\nto train anyway and sync later: tracking.on_unreachable=keep") from error
        _log.warning("tracking.uri=%s is unreachable; metrics are recorded in the run directory and sent later", uri)


def ensure_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """Get or create an experiment, and return its id; with sqlite its artefacts are stored beside the database."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=_artifact_location(uri)))
        except MlflowException:  # another run may have created it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def absolute(uri: str) -> str:
    """The URI with an absolute path if it is a sqlite database."""
    path = _sqlite_path(uri)
    return uri if path is None else f"{_SQLITE_PREFIX}{path}"


def ui_command(uri: str, host: str, port: int) -> list[str]:
    """The command that starts the MLflow UI."""
    return [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", host, "--port", str(port),
        *(["--default-artifact-root", location] if (location := _artifact_location(uri)) else []),
    ]  # fmt: skip


def _artifact_location(uri: str) -> str | None:
    """Beside a sqlite file; ``None`` for other stores, where the server decides."""
    path = _sqlite_path(uri)
    return None if path is None else (path.parent / "mlartifacts").as_uri()


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix(_SQLITE_PREFIX)).resolve() if uri.startswith(_SQLITE_PREFIX) else None


def _make_sqlite(uri: str) -> None:
    """Create a sqlite database atomically: a process that dies while MLflow creates the tables leaves no partial file.

    If two processes create it at the same time, the first file is kept.
    """
    path = _sqlite_path(uri)
    if path is None:
        return
    with _creation:
        if path.exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            draft = Path(folder) / path.name
            SqlAlchemyStore(f"{_SQLITE_PREFIX}{draft}", _artifact_location(uri)).engine.dispose()
            try:
                os.link(draft, path)
            except FileExistsError:
                return
            except OSError:  # the file system has no hard links
                draft.replace(path)


def _may_be_a_server(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        return False


def _is_unreachable(error: BaseException) -> bool:
    """Whether the server did not answer, as opposed to an error response."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import ConnectionError as NoConnection
    from requests.exceptions import RetryError, Timeout

    if isinstance(error, (NoConnection, RetryError, Timeout)):
        return True
    if isinstance(error, MlflowException) and error.get_http_status_code() in _GATEWAY_ERRORS:
        return True
    inner = error.__cause__ or error.__context__
    return inner is not None and _is_unreachable(inner)


def _check_file(uri: str) -> None:
    """Refuse paths that cannot be a database; MLflow would retry for minutes, or write into another small file."""
    path = _sqlite_path(uri)
    if path is None:
        return
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            is_database = file.read(len(_SQLITE)) == _SQLITE
        if not is_database:
            raise ConfigError(f"tracking.uri={uri} cannot be used: {path} is not a sqlite database")
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if path.is_dir() or not os.access(existing, os.W_OK) or (existing != path and not existing.is_dir()):
        raise ConfigError(
            f"tracking.uri={uri} cannot be used: {path} must be a file in a writable directory, "
            "such as tracking.uri=sqlite:///mlflow.db"
        )
