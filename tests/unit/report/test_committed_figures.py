"""The figures in the repository can be drawn again from the tables beside them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[3] / "experiments"


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("committed_figures", EXPERIMENTS / "figures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_points_are_those_of_the_tables(figures: ModuleType) -> None:
    """The lines of FedAvg and of the last rule in the first table of the ablation, read by hand."""
    table = figures.tables(EXPERIMENTS / "ablation" / "README.md")[0]
    found, labels = figures.points(table)
    assert found["fedavg"] == (0.0606, 0.22, 0.0019, 0.0)
    assert found["fellrec fidelity=released_code"] == (0.0979, 0.69, 0.0032, 0.0)
    assert labels["fellrec fidelity=released_code"] == "released code"
    assert len(found) == len(table) == 8


def test_every_committed_figure_has_its_panels(figures: ModuleType) -> None:
    panels = {name: [axes for axes in make().axes if axes.axison] for name, make in figures.FIGURES.items()}
    assert {name: len(found) for name, found in panels.items()} == {
        "ablation/ablation.png": 2,
        "does_fellrec_help/report.png": 2,
        "main_table/main_table.png": 6,
        "split_depth/split_depth.png": 9,
    }
    assert all((EXPERIMENTS / name).is_file() for name in figures.FIGURES)
