"""A finished run that cases change."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from fellrec.cli.main import main


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
