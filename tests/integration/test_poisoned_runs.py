"""A comparison with a client that misbehaves: what its tables and files say of it and of the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scripts import load_script

import fellrec
from fellrec.report.comparison import Comparison
from fellrec.report.main_table import print_comparison
from fellrec.report.report_tables import clients_table
from fellrec.report.runs import read_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def comparison(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    how = [
        "~callbacks.model",
        "poison.clients=[1]",
        "aggregation=fedavg,fellrec",
        "seed=0,1",
        "tracking.uri=null",
        "references.show=[random]",
    ]
    return fellrec.compare([*tiny_overrides, *how, f"run_dir={tmp_path_factory.mktemp('poisoned') / 'compare'}"])


def honest(comparison: Comparison, line: str) -> list[float]:
    """Mean over clients 0 and 2 of each run of a line."""
    return [float(r.evaluation.per_client["ndcg_at_10"][[0, 2]].mean()) for r in comparison.of_rule(line)]


def test_tables_have_the_mean_over_honest_clients_and_mark_the_others(comparison: Comparison) -> None:
    console = Console(width=160, record=True)
    print_comparison(comparison, console)
    shown = console.export_text()
    assert "honest: the mean over clients without poisoned client 1." in " ".join(shown.split())
    row = next(line for line in shown.splitlines() if line.lstrip().startswith("FELLRec"))
    assert f"{np.mean(honest(comparison, 'fellrec')):.4f}" in row
    assert comparison.run_dir is not None
    numbers = pd.read_csv(comparison.run_dir / "comparison" / "comparison.csv").set_index("rule")
    for line in ("fedavg", "fellrec"):
        assert numbers.loc[line, "ndcg_at_10_honest"] == pytest.approx(np.mean(honest(comparison, line)), rel=1e-12)
        deviation = np.std(honest(comparison, line), ddof=1)
        assert numbers.loc[line, "ndcg_at_10_honest_sd"] == pytest.approx(deviation, rel=1e-9)
    assert comparison.to_frame("clients")["poisoned"].tolist() == [False, True, False] * 5
    table = clients_table(comparison, "ndcg_at_10")
    assert table.text["client"].tolist() == ["0", "1*", "2"]
    assert table.numbers["poisoned"].tolist() == [False, True, False]


def test_the_files_of_a_run_name_its_poisoned_clients(comparison: Comparison) -> None:
    assert comparison.run_dir is not None
    run_dir = Path(comparison.run_dir) / "fedavg-s0"
    assert pd.read_csv(run_dir / "clients.csv")["poisoned"].tolist() == [False, True, False]
    found = json.loads((run_dir / "results.json").read_text())
    assert found["poisoned_clients"] == [1]
    assert found["summary"]["honest_clients/ndcg_at_10/mean"] == honest(comparison, "fedavg")[0]
    assert "| 1 (poisoned) |" in (run_dir / "report.md").read_text()
    assert read_run(run_dir).result.evaluation.poisoned == (1,)
    whole = json.loads((Path(comparison.run_dir) / "comparison" / "comparison.json").read_text())
    assert whole["poisoned_clients"] == [1]


def test_the_report_of_the_experiment(comparison: Comparison, tmp_path: Path) -> None:
    """The same runs as before and after: nothing changes. FedAvg's weight is a client's share of all samples."""
    report = load_script(ROOT / "experiments" / "poisoning" / "report.py")
    assert comparison.run_dir is not None
    for kind in ("none", "sign_flip"):
        shutil.copytree(comparison.run_dir, tmp_path / kind)
    report.main(tmp_path)
    table = pd.read_csv(tmp_path / "poisoning.csv").set_index(["rule", "kind"])
    assert table.index.tolist() == [(rule, kind) for rule in ("fedavg", "fellrec") for kind in ("none", "sign_flip")]
    changes = ["pooled_difference", "low", "high", "worst_honest_change", "poisoned_change"]
    assert not table[changes].to_numpy().any()
    assert table.loc[("fedavg", "none"), "honest"] == pytest.approx(np.mean(honest(comparison, "fedavg")), rel=1e-12)
    samples = json.loads((Path(comparison.run_dir) / "fedavg-s0" / "data.json").read_text())["statistics"]
    share = np.array(samples["train_targets_per_client"]) / sum(samples["train_targets_per_client"])
    assert table.loc[("fedavg", "none"), "weight"] == pytest.approx(share[1], rel=1e-9)
    assert pd.read_csv(tmp_path / "clients.csv").columns.tolist()[2:] == ["client_0", "client_1", "client_2"]
    assert "| 0 | 1* | 2 |" in (tmp_path / "clients.md").read_text()
