"""The package as a library: the notebook of the documentation, cell by cell, and what its functions give."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import fellrec
from fellrec.errors import ConfigError

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"


def cells() -> list[str]:
    """The code of the notebook's cells."""
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


def execute(cell: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does: the value of its last expression is its output."""
    body = ast.parse(cell).body
    last = ast.Expression(body.pop().value) if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), str(NOTEBOOK), "exec"), names)
    return None if last is None else eval(compile(last, str(NOTEBOOK), "eval"), names)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> tuple[list[Any], dict[str, Any]]:
    """Outputs of the notebook's cells, and its names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        patch.setenv("FELLREC_CACHE", str(cache))
        names: dict[str, Any] = {}
        return [execute(cell, names) for cell in cells()], names


def test_the_notebook_has_ten_lines_of_its_own() -> None:
    assert sum(len(cell.splitlines()) for cell in cells()) <= 10


def test_the_notebook_trains_compares_and_plots(notebook: tuple[list[Any], dict[str, Any]]) -> None:
    """The run and the comparison's line with the same settings and seed have the same figures, bit for bit."""
    outputs, names = notebook
    comparison = names["comparison"]
    runs = comparison.to_frame()
    assert runs["rule"].tolist() == ["fedavg", "fellrec"]
    assert outputs[2] == runs.loc[1, "ndcg_at_10/mean"]
    stored = json.loads((comparison.run_dir / "fellrec-s0" / "results.json").read_text())
    assert stored["summary"]["ndcg_at_10/mean"] == outputs[2]
    of_clients = outputs[3][outputs[3]["rule"] == "fellrec"]
    assert of_clients["ndcg_at_10"].tolist() == stored["per_client"]["ndcg_at_10"]
    assert outputs[4]._repr_svg_().count("<svg") == 1


def test_rows_of_users_give_those_of_clients_and_runs(notebook: tuple[list[Any], dict[str, Any]]) -> None:
    """A client's metric is the mean over its users, and a run's the mean over its clients."""
    comparison = notebook[1]["comparison"]
    users, clients, runs = (comparison.to_frame(of) for of in ("users", "clients", "runs"))
    means = users.groupby(["rule", "client"])["ndcg_at_10"].mean().reset_index()
    pd.testing.assert_series_equal(means["ndcg_at_10"], clients["ndcg_at_10"])
    np.testing.assert_allclose(
        clients.groupby("rule", sort=False)["ndcg_at_10"].mean(), runs["ndcg_at_10/mean"], rtol=1e-12
    )
    assert runs.shape[1] < 20, "a table that can be read"
    everything = comparison.to_frame(all_figures=True)
    assert {*runs} < {*everything}
    assert {*comparison.results[0].evaluation.summary} < {*everything}
    with pytest.raises(ConfigError, match="unknown kind of rows 'runz'; choose from: runs"):
        comparison.to_frame("runz")


def test_a_figure_is_saved_as_its_name_says(notebook: tuple[list[Any], dict[str, Any]], tmp_path: Path) -> None:
    comparison = notebook[1]["comparison"]
    drawn = fellrec.plot(comparison, "spread")
    for form, start in {"svg": b"<?xml", "pdf": b"%PDF", "png": b"\x89PNG"}.items():
        drawn.save(tmp_path / f"figure.{form}")
        assert (tmp_path / f"figure.{form}").read_bytes().startswith(start)
    with pytest.raises(ConfigError, match="unknown format 'gif'"):
        drawn.save(tmp_path / "figure.gif")
    with pytest.raises(ConfigError, match="unknown figure 'clientz'; choose from: clients"):
        fellrec.plot(comparison, "clientz")
    with pytest.raises(ConfigError, match="unknown metric 'ndcg_at_7'"):
        fellrec.plot(comparison, "clients", "ndcg_at_7")


def test_wrong_settings_of_the_functions() -> None:
    for function in (fellrec.run, fellrec.compare):
        with pytest.raises(ConfigError, match="must be a list of texts"):
            function("aggregation=fedavg")
        with pytest.raises(ConfigError, match="unknown aggregation 'fedavgg'"):
            function(["aggregation=fedavgg"])
    with pytest.raises(ConfigError, match="start several by fellrec train"):
        fellrec.compare(["aggregation=fedavg", "trainer.devices=2"])


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys; import fellrec; dir(fellrec); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "pandas", "numpy", "hydra", "omegaconf", "matplotlib", "jinja2", "mlflow"} & set(loaded)


def test_every_public_name_exists_and_types_are_published() -> None:
    for name in fellrec.__all__:
        assert getattr(fellrec, name) is not None
    assert (files("fellrec") / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = fellrec.runn
