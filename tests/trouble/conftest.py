"""A finished run that cases change, and how a small data set is prepared or refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from shop import COMMON

from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.data.prepared import PreparedData
from fellrec.experiment.build import build_data


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_overrides: list[str]) -> Path:
    """A folder with a finished run ``run`` of two rounds."""
    folder = tmp_path_factory.mktemp("trained")
    before = Path.cwd()
    os.chdir(folder)
    try:
        main(["train", *tiny_overrides, "references.show=[popularity]", "run_dir=run"])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def run_dir(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run, in the current folder."""
    shutil.copytree(trained / "run", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.fixture
def data(tmp_path: Path, cache: Path) -> Callable[..., PreparedData]:
    """Prepares the files of the test's folder."""

    def prepared(*overrides: str) -> PreparedData:
        return build_data(compose([*COMMON, f"data.root={tmp_path}", f"cache_dir={cache}", *overrides]))

    return prepared


@pytest.fixture
def refused(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line with which a verb refuses."""

    def message(*overrides: str, verb: str = "prepare") -> str:
        with pytest.raises(SystemExit) as stop:
            main([verb, *COMMON, f"data.root={tmp_path}", f"cache_dir={cache}", *overrides])
        assert stop.value.code == 1
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]

    return message
