"""The figures in the repository can be drawn again from the tables beside them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from scripts import load_script

EXPERIMENTS = Path(__file__).resolve().parents[3] / "experiments"


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return load_script(EXPERIMENTS / "figures.py")


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
        "does_fellrec_help/gains.png": 1,
        "does_fellrec_help/report.png": 2,
        "main_table/main_table.png": 6,
        "split_depth/split_depth.png": 9,
    }
    assert all((EXPERIMENTS / name).is_file() for name in figures.FIGURES)


def test_the_first_table_of_the_answer_is_that_of_its_figure(figures: ModuleType) -> None:
    """Percentages of the page, and two of them by hand: 0.0212 of 0.1024 and -0.0051 of 0.1208."""
    found, page = figures.gains(), EXPERIMENTS.parent / "docs" / "does_fellrec_help.md"
    table = next(table for table in figures.tables(page) if table.columns[0] == "setting").set_index("setting")
    columns = {"local": "local", "uniform": "plain mean", "fellrec": "FELLRec"}
    assert list(table.index) == list(found)
    for setting, rows in found.items():
        for rule, column in columns.items():
            gain, low, high = rows.loc[rule]
            assert table.loc[setting, column] == f"{gain:+.0f} [{low:+.0f}, {high:+.0f}]"
    assert round(found["SASRec, tuned: MovieLens-1M"].loc["fellrec", "gain"], 1) == 20.7
    assert round(found["retrieval: generated"].loc["fellrec", "gain"], 1) == -4.2
