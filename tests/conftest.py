"""What all tests share: the real data, and a synthetic run that is small enough to train in a second."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

# Two workers share two cores: threads that spin while they wait for each other would take 6 to 20 times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# ranx, with which some figures are compared, would compile for a minute what it computes in a second.
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")

# Nothing is sent to the makers of a library.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# MLflow's server starts nine more processes for jobs of its own, each of which imports MLflow anew.
os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")

# A shell that starts the tests in the background lets them ignore Ctrl-C, and every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]

TINY = [
    "data.reader.num_users=90",
    "data.reader.num_items=60",
    "data.reader.mean_length=12",
    "partition.num_clients=3",
    "backbone.hidden_size=16",
    "backbone.num_layers=2",
    "backbone.pretrain.steps=3",
    "trainer.num_rounds=2",
    "trainer.batch_size=16",
]
"""Overrides of a run that takes about a second."""


_SLOW_FOLDERS = {"integration", "conformance", "system", "benchmarks", "trouble", "fuzz"}
"""Whole runs, services, processes: their tests are slow, as are those that are marked."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that ``make test-fast`` leaves out."""
    for item in items:
        if _SLOW_FOLDERS & set(item.path.parts):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of the real data sets, which cannot be shipped."""
    folder = Path(os.environ.get("FELLREC_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs the real data: {folder} is absent; set FELLREC_TEST_DATA")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test adds to the user's record of tracking stores, nor do processes that tests start."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables, which take seconds to create; tests copy it."""
    from fellrec.tracking.store import connect

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    connect(f"sqlite:///{path}")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of prepared data and backbones for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def tiny_overrides(cache: Path) -> list[str]:
    """Overrides of a small synthetic run that uses the session's cache."""
    return [*TINY, f"cache_dir={cache}"]


@pytest.fixture(scope="session")
def lean_overrides(tiny_overrides: list[str]) -> list[str]:
    """Overrides of a small run without the figure and the MLflow model, which take as long as its training."""
    return [*tiny_overrides, "~callbacks.matrices", "~callbacks.model"]
