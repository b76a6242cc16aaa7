"""Stores that cannot be used are refused at once, and nothing is touched."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fellrec.errors import ConfigError
from fellrec.tracking.store import check_reachable, make_logger, ui_command


@pytest.mark.parametrize("name", ["folder", "file.txt/mlflow.db", "file.txt"])
def test_a_sqlite_path_that_cannot_be_opened_is_refused_at_once(
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


def test_a_new_store_is_not_made_by_the_check(tmp_path: Path) -> None:
    check_reachable(f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_answer_is_refused_within_seconds() -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"tracking.uri=http://127.0.0.1:9 cannot be used"):
        check_reachable("http://127.0.0.1:9")
    assert time.monotonic() - started < 30


def test_going_on_with_a_run_that_the_store_does_not_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not hold run 0123"):
        make_logger(f"sqlite:///{tmp_path / 'mlflow.db'}", "fellrec", "run", {}, run_id="0123")


def test_the_ui_serves_artefacts_from_beside_the_database(tmp_path: Path) -> None:
    command = ui_command(f"sqlite:///{tmp_path / 'mlflow.db'}", "127.0.0.1", 5000)
    assert (tmp_path / "mlartifacts").as_uri() in command
