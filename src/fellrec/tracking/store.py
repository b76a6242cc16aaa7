"""The MLflow store: whether it can be used, its experiments, the command of the UI.

MLflow takes seconds to import, so it is imported where it is needed.
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
"""What a database file begins with."""
_GATEWAY_ERRORS = (502, 503, 504)
"""What a proxy answers when the server behind it is away."""

_log = logging.getLogger(__name__)
_making = threading.Lock()
"""MLflow's own check whether the tables are there does not hold other threads up."""


def connect(uri: str) -> MlflowClient:
    """A client of the store; nothing is asked yet.

    A request that fails is not repeated by MLflow: if its answer was lost, a run would be made twice. The outbox
    repeats it, after a look at what is there.
    """
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is the table's
    from mlflow.tracking import MlflowClient

    _make_sqlite(uri)
    return MlflowClient(tracking_uri=uri)


def make_client(uri: str) -> MlflowClient:
    """A client whose first answer shows that the store can be used.

    Raises:
        ConfigError: If the store does not answer within seconds.
    """
    _check_file(uri)
    try:
        client = connect(uri)
        client.search_experiments(max_results=1)
    except Exception as error:  # MLflow, SQLAlchemy and requests each raise their own
        raise ConfigError(f"tracking.uri={uri} cannot be used: {str(error).splitlines()[0]}") from error
    return client


def check_reachable(uri: str, may_be_away: bool = False) -> None:
    """Refuse a store that cannot be used; a new sqlite file is made only when it is needed.

    Args:
        uri: MLflow tracking URI.
        may_be_away: A tracking server that does not answer is no reason to refuse; one that answers with an error is.

    Raises:
        ConfigError: See above.
    """
    path = _sqlite_path(uri)
    if path is not None and not path.exists():
        _check_file(uri)
        return
    try:
        make_client(uri)
    except ConfigError as error:
        if not (_may_be_a_server(uri) and error.__cause__ and _is_silence(error.__cause__)):
            raise
        if not may_be_away:
            raise ConfigError(f"{error}\nto start all the same and send later: tracking.on_unreachable=keep") from error
        _log.warning("tracking.uri=%s does not answer; the run starts, and what it logs is kept", uri)


def ensure_experiment(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment's id; a new one keeps its artefacts beside a sqlite store, whatever the current folder is."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=_artifact_location(uri)))
        except MlflowException:  # another run may have made it in between
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    return str(found.experiment_id)


def absolute(uri: str) -> str:
    """The URI as it reads from any folder."""
    path = _sqlite_path(uri)
    return uri if path is None else f"{_SQLITE_PREFIX}{path}"


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
    return Path(uri.removeprefix(_SQLITE_PREFIX)).resolve() if uri.startswith(_SQLITE_PREFIX) else None


def _make_sqlite(uri: str) -> None:
    """Make a new sqlite store as a whole: a process that dies while MLflow makes its tables leaves a file of no use.

    Two processes may do so at the same time; the first one's file stays.
    """
    path = _sqlite_path(uri)
    if path is None:
        return
    with _making:
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
            except OSError:  # a file system without hard links
                draft.replace(path)


def _may_be_a_server(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # no port number
        return False


def _is_silence(error: BaseException) -> bool:
    """Whether nobody answered, as opposed to a refusal."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import ConnectionError as NoConnection
    from requests.exceptions import RetryError, Timeout

    if isinstance(error, (NoConnection, RetryError, Timeout)):
        return True
    if isinstance(error, MlflowException) and error.get_http_status_code() in _GATEWAY_ERRORS:
        return True
    inner = error.__cause__ or error.__context__
    return inner is not None and _is_silence(inner)


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
