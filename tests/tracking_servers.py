"""MLflow servers on sqlite and PostgreSQL that tests start, kill and restart, and the content of their stores."""

from __future__ import annotations

import csv
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy
from preloaded import Preloaded

from fellrec.tracking.outbox import operations

_OWN_TAGS = ("fellrec.run_uid", "mlflow.source")
"""Tags with the run's identity and the program that was started."""
_UPLOADING = ".artifact.uploading."
"""Temporary files of MLflow: one remains if the server is killed during an upload, and MLflow does not list it."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(
    condition: Callable[[], Any], alive: subprocess.Popen[Any] | Preloaded, log: Path, seconds: float = 240
) -> None:
    """Wait for a condition; fail with the process's log if the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert alive.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


class Server:
    """``mlflow server`` with a database; artefacts are stored in ``folder/artifacts``."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder, self.database = folder, database
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.log = folder / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.database, "--workers", "1"]
        command += ["--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with self.log.open("a") as log:
            self._process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)
        wait_for(self._answers, self._process, self.log)

    def kill(self) -> None:
        """Kill the server and its workers."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=2)
        except OSError:
            return False
        return True


class Relay:
    """Forwards connections to a port, and records the process that opened each."""

    def __init__(self, port: int) -> None:
        self.processes: set[int] = set()
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, (_, port) = self._listener.accept()
                self.processes.add(self._process(port))
                far = socket.create_connection(("127.0.0.1", self._target))
                for source, drain in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=(source, drain), daemon=True).start()

    def _process(self, port: int) -> int:
        (owner,) = {
            connection.pid
            for connection in psutil.net_connections("tcp4")
            if connection.laddr and connection.laddr.port == port and connection.pid != os.getpid()
        }
        return owner

    def _forward(self, source: socket.socket, drain: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                drain.sendall(data)
            drain.shutdown(socket.SHUT_WR)


@contextmanager
def postgresql() -> Iterator[str]:
    """Start a PostgreSQL server; yields the URI of an empty database."""
    programs = _postgresql_programs()
    as_root = os.geteuid() == 0
    user: dict[str, Any] = {"user": "postgres", "group": "postgres", "extra_groups": []} if as_root else {}
    folder = Path(tempfile.mkdtemp(prefix="fellrec-postgresql-"))
    if as_root:
        os.chown(folder, pwd.getpwnam("postgres").pw_uid, -1)
    port, data = free_port(), folder / "data"
    initialise = [programs / "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C"]
    subprocess.run(initialise, check=True, capture_output=True, cwd=folder, **user)
    serve = [programs / "postgres", "-D", data, "-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1"]
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(serve, cwd=folder, stdout=output, stderr=output, start_new_session=True, **user)
    try:
        ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        wait_for(lambda: subprocess.run(ready, check=False).returncode == 0, process, log)
        yield f"postgresql+psycopg2://postgres@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)  # its fast shutdown
        process.wait(timeout=60)
        shutil.rmtree(folder)
        log.unlink()


def _postgresql_programs() -> Path:
    """Directory of the PostgreSQL programs, installed with apt-get if possible."""

    def found() -> list[Path]:
        return sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))

    if not found() and shutil.which("apt-get") and os.geteuid() == 0:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "postgresql"]):
            subprocess.run(command, check=False, capture_output=True, timeout=600, env=quiet)
    if not found():
        pytest.skip("needs PostgreSQL, which cannot be installed here (as root: apt-get install postgresql)")
    return found()[-1].parent


@dataclass(frozen=True)
class Content:
    """Content of a store for one run, read from the database and the artefact directory.

    Attributes:
        points: ``(key, step, timestamp, value)`` of every logged point, sorted; duplicates are kept.
        params: By name.
        tags: By name.
        datasets: Names and digests.
        artifacts: Path → bytes.
        status: Status of the run.
    """

    points: list[tuple[str, int, int, float]]
    params: dict[str, str]
    tags: dict[str, str]
    datasets: list[tuple[str, str]]
    artifacts: dict[str, bytes]
    status: str

    def comparable(self) -> tuple[Any, ...]:
        """Everything that two runs with the same settings must share: no times, no directory names."""
        points = [
            (key, step, None if "seconds" in key or "busy" in key or key.startswith("system/") else value)
            for key, step, _, value in self.points
        ]
        params = {key: value for key, value in self.params.items() if key not in ("run_dir", "tracking.uri", "resume")}
        tags = {key: value for key, value in self.tags.items() if not key.startswith(_OWN_TAGS)}
        artifacts: dict[str, Any] = {path: data for path, data in self.artifacts.items() if path != "config.yaml"}
        if "results.json" in artifacts:
            artifacts["results.json"] = {**json.loads(artifacts["results.json"]), "cost": "contains times"}
        artifacts |= {path: _without_times(data) for path, data in artifacts.items() if path.endswith(".csv")}
        return sorted(points, key=str), params, tags, self.datasets, artifacts, self.status, len(self.artifacts)


def _without_times(table: bytes) -> list[dict[str, str]]:
    """Rows of a CSV file without its columns of seconds."""
    rows = csv.DictReader(table.decode().splitlines())
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in rows]


def content(database: str, artifacts: Path, uid: str) -> Content:
    """Content of the store for the run with this ``fellrec.run_uid``; fails if there are two such runs."""
    engine = sqlalchemy.create_engine(database)
    with engine.connect() as connection:

        def rows(query: str, **values: Any) -> list[Any]:
            return [tuple(row) for row in connection.execute(sqlalchemy.text(query), values)]

        ((run,),) = rows("SELECT run_uuid FROM tags WHERE key = 'fellrec.run_uid' AND value = :uid", uid=uid)
        points = rows("SELECT key, step, timestamp, value FROM metrics WHERE run_uuid = :run", run=run)
        params = rows("SELECT key, value FROM params WHERE run_uuid = :run", run=run)
        tags = rows("SELECT key, value FROM tags WHERE run_uuid = :run", run=run)
        datasets = rows(
            "SELECT d.name, d.digest FROM datasets d JOIN inputs i ON i.source_id = d.dataset_uuid "
            "WHERE i.destination_id = :run",
            run=run,
        )
        ((status, where),) = rows("SELECT status, artifact_uri FROM runs WHERE run_uuid = :run", run=run)
    engine.dispose()
    folder = artifacts / where.removeprefix("mlflow-artifacts:/").removeprefix(artifacts.as_uri()).lstrip("/")
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(_UPLOADING)
    }
    return Content(sorted(points), dict(params), dict(tags), datasets, files, status)


def logged_points(outbox: Path) -> list[tuple[str, int, int, float]]:
    """Every point in the outbox of a run."""
    return sorted(
        (key, operation.fields["step"], operation.time, value)
        for operation in operations(outbox)
        if operation.kind == "metrics"
        for key, value in operation.fields["metrics"].items()
    )
