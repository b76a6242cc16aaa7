"""Stores that cannot be used are refused immediately, without side effects."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fellrec.errors import ConfigError
from fellrec.tracking.store import absolute, check_reachable, connect, make_client, ui_command


@pytest.mark.parametrize("name", ["folder", "file.txt/mlflow.db", "file.txt"])
def test_a_sqlite_path_that_cannot_be_opened_is_refused_immediately(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("a note")
    started = time.monotonic()
    with pytest.raises(ConfigError, match="tracking.uri=sqlite:///"):
        check_reachable(f"sqlite:///{name}")
    assert time.monotonic() - started < 5
    assert (tmp_path / "file.txt").read_text() == "a note"


def test_the_check_does_not_create_a_store(tmp_path: Path) -> None:
    check_reachable(f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}")
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_server_is_refused_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"tracking.uri=http://127.0.0.1:9 cannot be used"):
        check_reachable("http://127.0.0.1:9")
    assert time.monotonic() - started < 30


def test_an_unreachable_server_is_accepted_if_the_user_allows_it(caplog: pytest.LogCaptureFixture) -> None:
    check_reachable("http://127.0.0.1:9", may_be_away=True)
    assert "http://127.0.0.1:9 is unreachable" in caplog.text
    with pytest.raises(ConfigError, match="tracking.on_unreachable=keep"):
        check_reachable("http://127.0.0.1:9")


@pytest.mark.parametrize("uri", ["http://", "http://127.0.0.1:port", "htp://127.0.0.1:9"])
def test_an_invalid_address_is_always_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used") as refused:
        check_reachable(uri, may_be_away=True)
    assert "on_unreachable" not in str(refused.value)


@pytest.mark.parametrize(("code", "is_unreachable"), [(403, False), (404, False), (502, True), (503, True)])
def test_an_error_response_does_not_count_as_unreachable(code: int, is_unreachable: bool) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(code)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{server.server_port}"
        if is_unreachable:
            check_reachable(uri, may_be_away=True)
        else:
            with pytest.raises(ConfigError, match=str(code)):
                check_reachable(uri, may_be_away=True)
        server.shutdown()


def test_the_ui_serves_artefacts_stored_beside_the_database(tmp_path: Path) -> None:
    command = ui_command(f"sqlite:///{tmp_path / 'mlflow.db'}", "127.0.0.1", 5000)
    assert (tmp_path / "mlartifacts").as_uri() in command


@pytest.mark.slow
def test_a_new_sqlite_store_is_created_atomically(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes create it at the same time and are killed as soon as the file exists; it has every table.

    MLflow does not print that it creates them.
    """
    path = tmp_path / "mlflow.db"
    code = f"from fellrec.tracking.store import connect; connect('sqlite:///{path}'); import time; time.sleep(600)"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    try:
        deadline = time.monotonic() + 240
        while not path.exists():
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    make_client(f"sqlite:///{tmp_path / 'reference.db'}")
    assert capsys.readouterr() == ("", "")
    schemas = []
    for name in ("mlflow.db", "reference.db"):
        with sqlite3.connect(tmp_path / name) as database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master ORDER BY name")]
            # Not their SQL: MLflow writes the values of a CHECK in the order of a set, which differs between processes.
            schemas.append({name: database.execute(f"PRAGMA table_info('{name}')").fetchall() for name in tables})
            assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert schemas[0] == schemas[1]
    assert make_client(f"sqlite:///{path}").search_experiments()[0].name == "Default"


@pytest.mark.parametrize(
    "path", ["mlflow.db", "a/../b.db", "/tmp/x-1/store_2.db", "./a b.db", "with%20percent.db", "ü.db"]
)
def test_an_address_is_made_absolute_as_sqlalchemy_reads_it(path: str) -> None:
    """Most addresses are read without SQLAlchemy; what comes out must be the file that SQLAlchemy opens."""
    from sqlalchemy.engine import make_url

    uri = f"sqlite:///{path}"
    assert make_url(absolute(uri)).database == str(Path(str(make_url(uri).database)).resolve())


def test_a_database_whose_writer_was_killed_within_a_change_can_be_used(empty_store: Path, tmp_path: Path) -> None:
    """Seen where process 0 of a run was killed: the journal that it leaves can only be rolled back by a writer."""
    path = tmp_path / "mlflow.db"
    shutil.copy(empty_store, path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA cache_size = 1")  # pages are written before the end of the change
        rows = [(f"name {number}", "x" * 500, number) for number in range(1, 200)]
        database.executemany("INSERT INTO experiments (name, artifact_location, experiment_id) VALUES (?, ?, ?)", rows)
        for name in ("mlflow.db", "mlflow.db-journal"):
            shutil.copy(tmp_path / name, tmp_path / f"killed-{name}")
        database.rollback()
    killed = tmp_path / "killed.db"
    (tmp_path / "killed-mlflow.db").rename(killed)
    (tmp_path / "killed-mlflow.db-journal").rename(tmp_path / "killed.db-journal")
    with (
        pytest.raises(sqlite3.OperationalError),
        closing(sqlite3.connect(f"{killed.as_uri()}?mode=ro", uri=True)) as one,
    ):
        one.execute("SELECT name FROM sqlite_master").fetchall()
    assert [found.name for found in connect(f"sqlite:///{killed}").search_experiments()] == ["Default"]
