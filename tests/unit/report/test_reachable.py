"""Shares of what clients could reach, by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from rich.console import Console

from fellrec.metrics.summary import summarise
from fellrec.report.comparison import Comparison, RuleResult
from fellrec.report.plots import frontier, pareto, save_png
from fellrec.report.reachable import print_shares, shares, to_dict, write_shares


def result(rule: str, seed: int, values: list[float]) -> RuleResult:
    """One user a client; NaN is a client without users."""
    users = [client for client, value in enumerate(values) if value == value]
    per_user = {"ndcg_at_10": torch.tensor([values[client] for client in users]).double()}
    return RuleResult(rule, seed, "learned", summarise(per_user, torch.tensor(users), len(values), "test", 0), 1.0)


NAN = float("nan")


@pytest.fixture
def comparison() -> Comparison:
    """Means over seeds: FedAvg 0.2, 0.3, 0.1, –; centralised 0.4, 0.3, 0, –; local 0.1, 0.6, 0.2, –."""
    results = [
        *(result("fedavg", 0, [0.1, 0.3, 0.1, NAN]), result("fedavg", 1, [0.3, 0.3, 0.1, NAN])),
        *(result("centralized", 0, [0.5, 0.2, 0.0, NAN]), result("centralized", 1, [0.3, 0.4, 0.0, NAN])),
        *(result("local", 0, [0.1, 0.5, 0.2, NAN]), result("local", 1, [0.1, 0.7, 0.2, NAN])),
    ]
    return Comparison("films", (1, 1, 1, 0), 50, results)


def test_shares_by_hand(comparison: Comparison) -> None:
    """A client for which the reference has 0, or without users, has no share."""
    found = shares(comparison, "fedavg", "centralized", "ndcg_at_10")
    assert found is not None
    assert found.per_client == (pytest.approx(0.5), pytest.approx(1.0), None, None)
    assert (found.mean, found.worst, found.std) == pytest.approx((0.75, 0.5, 0.25))
    found = shares(comparison, "fedavg", "local", "ndcg_at_10")
    assert found is not None
    assert found.per_client[:3] == pytest.approx((2.0, 0.5, 0.5))
    assert shares(comparison, "fedavg", "uniform", "ndcg_at_10") is None


def test_a_reference_has_all_of_itself(comparison: Comparison) -> None:
    found = to_dict(comparison, "ndcg_at_10")
    assert found["centralized"]["centralized"]["worst"] == found["local"]["local"]["mean"] == 1.0
    json.dumps(found, allow_nan=False)


def test_the_tables(comparison: Comparison, tmp_path: Path) -> None:
    console = Console(width=80, file=io.StringIO(), record=True)
    print_shares(comparison, console, 10)
    text = console.export_text()
    assert "Share of what a client could reach, NDCG@10" in text
    (line,) = [line.split() for line in text.splitlines() if line.startswith("FedAvg")]
    assert line[1:] == ["75%", "50%", "25%", "100%", "50%", "71%"]
    write_shares(comparison, tmp_path, 10)
    numbers = pd.read_csv(tmp_path / "reachable.csv")
    row = numbers[(numbers.rule == "fedavg") & (numbers.reference == "local") & (numbers.client == 0)]
    assert row.share.tolist() == pytest.approx([2.0])
    assert "| FedAvg | 75% | 50% | 25% | 100% | 50% | 71% |" in (tmp_path / "reachable.md").read_text()


def test_without_a_reference_there_is_no_table(tmp_path: Path) -> None:
    alone = Comparison("films", (1,), 50, [result("fedavg", 0, [0.1]), result("fellrec", 0, [0.1])])
    console = Console(width=80, file=io.StringIO(), record=True)
    print_shares(alone, console, 10)
    write_shares(alone, tmp_path, 10)
    assert console.export_text() == ""
    assert not list(tmp_path.iterdir())


def test_the_front_is_what_nothing_is_better_than(tmp_path: Path) -> None:
    points = {"a": (0.5, 0.2), "b": (0.4, 0.1), "c": (0.4, 0.3), "d": (0.5, 0.2), "e": (0.5, 0.3)}
    assert pareto(points) == ["a", "b", "d"], "equal rules are both on it"
    save_png(frontier(points, "NDCG@10"), tmp_path / "frontier.png")
    save_png(frontier({"only": (0.1, 0.0)}, "NDCG@10"), tmp_path / "one.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000
