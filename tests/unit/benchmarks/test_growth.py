"""The benchmark of growth runs, draws, and finds the exponent of a power."""

from __future__ import annotations

import json
from pathlib import Path

import growth
import pytest

from fellrec.config.compose import compose
from fellrec.experiment.build import build_data


def test_rounds_of_few_clients_are_measured_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, figure = tmp_path / "figures.json", tmp_path / "growth.svg"
    growth.main(["--axes", "clients", "--largest", "50", "--json", str(file), "--figure", str(figure)])
    rows = json.loads(file.read_text())["clients"]["rows"]
    assert [row["value"] for row in rows] == [5, 50]
    assert all(row["round"] > 0 for row in rows)
    assert rows[1]["evaluation"] > 0
    assert "<svg" in figure.read_text()
    assert "exponent" in capsys.readouterr().out


def test_the_exponent_is_that_of_the_last_half() -> None:
    values = [1, 10, 100, 1000]
    assert growth.exponent(values, [5.0, 5.0, 50.0, 500.0]) == pytest.approx(1)
    assert growth.exponent(values, [3.0] * 4) == pytest.approx(0, abs=1e-12)


def test_an_unknown_axis_is_refused() -> None:
    with pytest.raises(SystemExit, match="--axes=users: users must be among clients, catalogue, history, rank"):
        growth.main(["--axes", "users"])


def test_a_catalogue_of_the_size_that_is_asked_for_is_measured() -> None:
    """Items without an interaction are not in the data: nearly all have one."""
    config = compose([*growth.COMMON, *growth.AXES["catalogue"][2](1000)])
    assert 990 <= len(build_data(config).catalogue) <= 1000
