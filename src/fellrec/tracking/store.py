"""The MLflow tracking store: clients, checks, experiments, the command of the UI.

Importing MLflow takes seconds, so functions import it when they need it.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sqlite3
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from fellrec.errors import ConfigError
from fellrec.functional.secrets import VARIABLE, reveal
from fellrec.tracking.quiet import quiet_mlflow
from fellrec.tracking.settings import DEFAULT_URI

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient
    from sqlalchemy.engine import URL

_PLAIN = re.compile(r"sqlite:///(?P<path>[\w./-]+)", re.ASCII)
"""A sqlite address in which nothing is quoted: the path is read without SQLAlchemy, whose import takes a second."""
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Names of the loopback interface."""
_CREDENTIALS = (
    f"if it needs a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or {VARIABLE} with both in it"
)
_GATEWAY_ERRORS = (502, 503, 504)
"""HTTP status codes of a proxy whose server is unreachable."""

_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
"""Of the databases, besides sqlite, that MLflow can use."""
_CONNECT_SECONDS = 10.0

_log = logging.getLogger(__name__)
_creation = threading.Lock()
"""Only one thread creates the database; MLflow's own check of the tables is not thread-safe."""


class NoAnswer(Exception):
    """The server of a database did not answer."""


def connect(uri: str) -> MlflowClient:
    """Create a client without sending a request; a database must answer, as MLflow connects to it at once.

    MLflow's own retries are switched off: if only the response was lost, a retry would create a run twice. The outbox
    retries instead, and looks for the run first.

    Raises:
        ConfigError: If the address of a server has options.
        NoAnswer: If there is nothing at the address of a database.
    """
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output has the results only
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if reveal(uri).startswith("http") and set("?#") & set(reveal(uri)):
        raise ConfigError(f"tracking.uri={uri} cannot be used: an address of a server has no options after ? or #")
    _check_answers(uri)
    from mlflow.tracking import MlflowClient

    with quiet_mlflow():
        _make_sqlite(uri)
        return MlflowClient(tracking_uri=reveal(uri))


def make_client(uri: str) -> MlflowClient:
    """Create a client and send a first request.

    Raises:
        ConfigError: If the store cannot be used or does not answer within seconds.
    """
    try:
        _check_file(uri)
        client = connect(uri)
        with quiet_mlflow():  # it may create the tables of a server's database
            client.search_experiments(max_results=1)
    except ConfigError:
        raise
    except Exception as error:  # MLflow, SQLAlchemy, sqlite3 and requests raise different types
        hint = f"\n{_CREDENTIALS}" if _is_refused(error) else ""
        raise ConfigError(f"tracking.uri={uri} cannot be used: {_first_line(error)}{hint}") from error
    return client


def check_reachable(uri: str | None, may_be_away: bool = False, experiment: str | None = None) -> None:
    """Check that the store can be used, without creating a new sqlite file.

    Args:
        uri: MLflow tracking URI; ``None`` if nothing is tracked.
        may_be_away: Whether an unreachable server, a locked database and a deleted experiment only cause a warning. A
            server that responds with an error is an error in any case.
        experiment: Name of the experiment, which must not be deleted; ``None`` if it need not be checked.

    Raises:
        ConfigError: If the store cannot be used.
    """
    if uri is None:
        return
    _check_options(uri)
    path = _sqlite_path(uri)
    if path is not None and not os.path.exists(path):
        _check_file(uri)
        return
    try:
        client = make_client(uri)
        problem = None if experiment is None else _deleted(client, uri, experiment)
    except ConfigError as error:
        if not (error.__cause__ and _is_away(uri, error.__cause__)):
            raise
        if not may_be_away:
            raise ConfigError(f"{error}\nto train anyway and sync later: tracking.on_unreachable=keep") from error
        problem = f"tracking.uri={uri} is unreachable"
    if problem and not may_be_away:
        raise ConfigError(problem)
    if problem:
        _log.warning("%s; metrics are recorded in the run directory and sent later", problem)


def look_at(uri: str) -> str:
    """Check a store without writing: no database, table or folder is created.

    Returns:
        The address, and what a run will do with it.

    Raises:
        ConfigError: If the store cannot be used.
    """
    path = _sqlite_path(uri)
    if path is None:
        if not reveal(uri).startswith("http"):  # MLflow creates tables or folders with the first connection
            return f"{uri}, not checked before a run starts"
        make_client(uri)
        return uri
    _check_options(uri)
    try:
        _check_file(uri)
    except sqlite3.OperationalError as error:
        raise ConfigError(f"tracking.uri={uri} cannot be used: {_first_line(error)}") from error
    return uri if os.path.exists(path) else f"{uri}, which the first run creates"


def _deleted(client: MlflowClient, uri: str, experiment: str) -> str | None:
    """What is wrong with an experiment that was deleted; ``None`` for one that can be used or created."""
    try:
        found = client.get_experiment_by_name(experiment)
    except Exception as error:
        raise ConfigError(f"tracking.uri={uri} cannot be used: {_first_line(error)}") from error
    if found is None or found.lifecycle_stage == "active":
        return None
    return (
        f"tracking.experiment={experiment} was deleted from {uri}: choose another name, or restore it by "
        f"mlflow experiments restore --experiment-id {found.experiment_id}"
    )


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


def experiment_id(uri: str, name: str) -> str | None:
    """The id of an experiment in a database, read without importing MLflow; ``None`` if it is not there."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import SQLAlchemyError

    path = _sqlite_path(uri)
    if path is not None and not path.is_file():
        return None
    engine = create_engine(reveal(uri))
    try:
        with engine.connect() as database:
            query = text("SELECT experiment_id FROM experiments WHERE name = :name AND lifecycle_stage = 'active'")
            found = database.execute(query, {"name": name}).scalar()
    except SQLAlchemyError:  # a store without tables, or one that does not answer: MLflow reports it
        return None
    finally:
        engine.dispose()
    return None if found is None else str(found)


def absolute(uri: str) -> str:
    """The URI with an absolute path if it is a sqlite database.

    Raises:
        ConfigError: If it is a sqlite database in memory, or cannot be read.
    """
    if (plain := _PLAIN.fullmatch(uri)) and _PLAIN.fullmatch(resolved := f"sqlite:///{Path(plain['path']).resolve()}"):
        return resolved
    url = _sqlite_url(uri)
    path = _sqlite_path(uri)
    return uri if url is None else url.set(drivername="sqlite", database=str(path)).render_as_string(False)


def ui_command(uri: str, host: str, port: int, allowed_hosts: Sequence[str] = ()) -> list[str]:
    """The command that starts the MLflow UI.

    An address with a password is not part of it, as other users can read the arguments of a process: give the command
    `ui_environment`.

    Args:
        uri: Of the store.
        host: Address to listen on.
        port: Port to listen on.
        allowed_hosts: Names under which the server may be used, besides those of the loopback interface; without any,
            MLflow decides.
    """
    location = _artifact_location(uri)
    names = [*_LOOPBACK, *allowed_hosts] if allowed_hosts else []
    return [
        *(sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", host, "--port", str(port)),
        *(["--backend-store-uri", uri] if reveal(uri) == uri else []),
        *(["--default-artifact-root", location] if location else []),
        *(["--allowed-hosts", ",".join(f"{name},{name.replace('[', '[[]')}:*" for name in names)] if names else []),
        *(["--cors-allowed-origins", ",".join(f"http://{name}:{port}" for name in names)] if names else []),
    ]


def ui_environment(uri: str) -> dict[str, str]:
    """The environment of `ui_command`."""
    return {**os.environ, "MLFLOW_BACKEND_STORE_URI": reveal(uri)}


def _artifact_location(uri: str) -> str | None:
    """Beside a sqlite file; ``None`` for other stores, where the server decides."""
    path = _sqlite_path(uri)
    return None if path is None else (path.parent / "mlartifacts").as_uri()


def _sqlite_url(uri: str) -> URL | None:
    """A sqlite address in its parts; ``None`` for another.

    Raises:
        ConfigError: See `absolute`.
    """
    if not uri.startswith(("sqlite:", "sqlite+pysqlite:")):
        return None
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except (ArgumentError, ValueError) as error:
        raise ConfigError(f"tracking.uri={uri} cannot be used: {_first_line(error)}") from error
    if not url.database or url.database.startswith((":memory:", "file:")) or url.host:
        raise ConfigError(f"tracking.uri={uri} cannot be used: give the path of a file, as in {DEFAULT_URI}")
    return url


def _sqlite_path(uri: str) -> Path | None:
    url = _sqlite_url(uri)
    return None if url is None else Path(str(url.database)).resolve()


def _make_sqlite(uri: str) -> None:
    """Create a sqlite database atomically: a process that dies while MLflow creates the tables leaves no partial file.

    If two processes create it at the same time, the first file is kept.
    """
    url, path = _sqlite_url(uri), _sqlite_path(uri)
    if url is None or path is None:
        return
    with _creation:
        if path.exists():
            return
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            draft = Path(folder) / path.name
            address = url.set(database=str(draft)).render_as_string(hide_password=False)
            SqlAlchemyStore(address, _artifact_location(uri)).engine.dispose()
            try:
                os.link(draft, path)
            except FileExistsError:
                return
            except OSError:  # the file system has no hard links
                draft.replace(path)


def _is_away(uri: str, error: BaseException) -> bool:
    """Whether a store may answer later: a server that did not answer, a database that is locked."""
    return isinstance(error, NoAnswer) or (_may_be_a_server(uri) and _is_unreachable(error)) or _is_locked(error)


def _is_locked(error: BaseException) -> bool:
    if isinstance(error, sqlite3.OperationalError):
        return "locked" in str(error)
    inner = error.__cause__ or error.__context__
    return inner is not None and _is_locked(inner)


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


def _is_refused(error: BaseException) -> bool:
    """Whether a server asks for a password or does not accept the one that it was given."""
    from mlflow.exceptions import MlflowException

    return isinstance(error, MlflowException) and error.get_http_status_code() in (401, 403)


def _tables(path: Path) -> set[str]:
    """The names of a database's tables, read without changing it, unless a writer was killed within a change.

    The journal which that one has left is rolled back then, as any access that may write does.
    """

    try:
        return _read_tables(path, "ro")
    except sqlite3.OperationalError as error:
        if _is_locked(error):
            raise
        return _read_tables(path, "rw")


def _read_tables(path: Path, mode: str) -> set[str]:
    with closing(sqlite3.connect(f"{path.as_uri()}?mode={mode}", uri=True)) as database:
        return {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def _check_file(uri: str) -> None:
    """Refuse paths that cannot be a store; MLflow would retry for minutes, or write into another file.

    Raises:
        ConfigError: If it is not a database of MLflow, or cannot be created.
        sqlite3.OperationalError: If the database is locked.
    """
    path = _sqlite_path(uri)
    if path is None:
        return
    if not _can_be_written(path):
        raise ConfigError(
            f"tracking.uri={uri} cannot be used: {path} must be a file in a writable directory, "
            f"such as tracking.uri={DEFAULT_URI}"
        )
    if path.is_file() and path.stat().st_size:
        try:
            tables = _tables(path)
        except sqlite3.DatabaseError as error:
            if _is_locked(error):
                raise
            raise ConfigError(f"tracking.uri={uri} cannot be used: {path} is not a sqlite database") from error
        if tables and "experiments" not in tables:
            raise ConfigError(f"tracking.uri={uri} cannot be used: {path} is a database of another program")


def _can_be_written(path: Path) -> bool:
    """Whether a file can be written or created, with its folders, and others beside it, as sqlite needs."""
    existing = next(place for place in (path, *path.parents) if os.path.exists(place))
    folder = path.parent if existing == path else existing
    if os.path.isdir(path) or not os.path.isdir(folder) or not all(os.access(p, os.W_OK) for p in (existing, folder)):
        return False
    try:
        with suppress(FileNotFoundError):
            path.lstat()  # fails if a name is too long
        with tempfile.TemporaryFile(dir=folder):  # fails in /proc
            return True
    except OSError:
        return False


def _check_answers(uri: str) -> None:
    """Connect to a database that is a server. MLflow would try it for minutes.

    Raises:
        NoAnswer: If nothing is there, or no connection can be made.
    """
    from sqlalchemy import create_engine
    from sqlalchemy.engine import make_url

    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme not in _PORTS:
        return
    url = make_url(reveal(uri))
    engine = create_engine(url)  # fails without the package of the database
    if url.host and not url.host.startswith("/"):
        try:
            socket.create_connection((url.host, url.port or _PORTS[scheme]), _CONNECT_SECONDS).close()
        except OSError as error:
            raise NoAnswer(f"{url.host}, port {url.port or _PORTS[scheme]}: {error.strerror or error}") from error
    with engine.connect():
        pass
    engine.dispose()


def _check_options(uri: str) -> None:
    """Refuse options of sqlite that have no effect or a wrong value, such as ``?timeout=soon``.

    Raises:
        ConfigError: If it refuses them.
    """
    from sqlalchemy import create_engine

    url = _sqlite_url(uri)
    if url is None or not url.query:
        return
    if "uri" in url.query:  # its options become part of the name of a new file
        raise ConfigError(f"tracking.uri={uri} cannot be used: sqlite's option uri is not supported")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            engine = create_engine(url.set(database=":memory:"))
        with engine.connect():
            pass
        engine.dispose()
    except Exception as error:  # of several types, depending on the option
        raise ConfigError(f"tracking.uri={uri} cannot be used: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
