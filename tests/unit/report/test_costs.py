"""Costs of runs made by hand: what adds up, what does not, and which names MLflow takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mlflow.utils.validation import _validate_metric_name
from rich.console import Console

from fellrec.federated.ledger import Ledger
from fellrec.federated.records import Aggregated, RoundRecord
from fellrec.metrics.summary import summarise
from fellrec.report.comparison import Comparison, RuleResult
from fellrec.report.cost_tables import cost_frame, cost_panels, print_run_cost
from fellrec.report.costs import Rounds, RunCost, Storage

STORAGE = Storage(client_bytes=3_000_000, server_bytes=1_000_000)


def record(round_index: int, seconds: float, **costs: float) -> RoundRecord:
    named = {f"cost/{name.replace('__', '/')}": value for name, value in costs.items()}
    return RoundRecord(round_index, (), Aggregated({}), None, seconds, named)


def two_rounds() -> Rounds:
    first = record(0, 4.0, server__busy_seconds=1.0, client__busy_seconds=3.0, server__peak_bytes=70)
    second = record(1, 2.0, server__busy_seconds=2.0, client__busy_seconds=0.0, server__peak_bytes=60)
    return Rounds().plus(first, 3.5).plus(second, 1.5)


def cost() -> RunCost:
    ledger = Ledger()
    for round_index in (0, 1):
        for client in (0, 1):
            ledger.add(client, round_index, "train", "up", "adapter", 100)
            ledger.add(client, round_index, "train", "down", "hidden_state", 1000)
        ledger.add(0, round_index, "val", "up", "hidden_state", 5)
    return RunCost.collect(STORAGE, two_rounds(), ledger.rows(), "inprocess")


def test_rounds_add_up_and_peaks_do_not() -> None:
    """Busy 1 s of 4 s and 2 s of 2 s: 3 of 6."""
    rounds = two_rounds()
    assert (rounds.num_rounds, rounds.seconds, rounds.cpu_seconds) == (2, 6.0, (3.5, 1.5))
    assert rounds.busy_rate("server") == rounds.busy_rate("client") == 0.5
    assert rounds.sums == {"server/busy_seconds": 3.0, "client/busy_seconds": 3.0}
    assert rounds.peaks == {"server/peak_bytes": 70}
    assert Rounds().busy_rate("server") is None


def test_bytes_of_a_round_leave_evaluations_out() -> None:
    """Two clients of 100 up and 1000 down."""
    found = cost()
    assert found.round_bytes() == 2200
    assert [found.round_bytes(direction) for direction in ("up", "down")] == [200, 2000]
    assert found.round_bytes("up", "adapter") == 200
    assert found.round_bytes(kind="gradient") == 0
    assert found.evaluation_bytes == 10
    assert found.storage.client_fraction == 0.75


def test_mlflow_takes_the_names() -> None:
    names = cost().metrics()
    assert names["cost/client/weight_bytes"] == 3_000_000
    assert names["cost/run/server_busy_rate"] == 0.5
    for name in names:
        _validate_metric_name(name)


def test_the_run_summary_says_what_was_measured() -> None:
    console = Console(width=100, record=True, file=Path("/dev/null").open("w"))  # noqa: SIM115
    print_run_cost(cost(), console)
    shown = console.export_text()
    for text in (
        "client 3.00 MB (75 %), server 1.00 MB", "evaluation crossed 10 B", "6.0 s of 2 rounds: server 50 %, client 50 %",
        "adapters", "200 B", "2.00 kB",
    ):  # fmt: skip
        assert text in shown, text


def variant(rule: str, of: str, values: list[float], seed: int = 0) -> RuleResult:
    per_user = {name: torch.tensor(values, dtype=torch.float64) for name in ("ndcg_at_10", "recall_at_10")}
    evaluation = summarise(per_user, torch.tensor([0, 1]), 2, "test", 0)
    return RuleResult(rule, seed, "learned", evaluation, 2.0, variant=of, cost=cost())


def test_variants_of_one_rule_and_seed_stay_apart() -> None:
    """Fedavg minus local within each variant: 0.1 and 0.3; the reference against both: 0.0 − (0.2 + 0.4) / 2."""
    reference = RuleResult("random", 0, "reference", variant("random", "", [0.0, 0.0]).evaluation)
    comparison = Comparison(
        "films",
        (1, 1),
        50,
        [
            variant("local", "head_layers=1", [0.2, 0.2]),
            variant("local", "head_layers=2", [0.4, 0.4]),
            variant("fedavg", "head_layers=1", [0.3, 0.3]),
            variant("fedavg", "head_layers=2", [0.7, 0.7]),
            reference,
        ],
    )
    assert comparison.variants == ["head_layers=1", "head_layers=2"]
    assert comparison.mean_and_sd("fedavg head_layers=2", "ndcg_at_10/mean") == (pytest.approx(0.7), 0.0)
    assert comparison.gain("fedavg head_layers=1", "ndcg_at_10") == pytest.approx(0.1)
    assert comparison.gain("fedavg head_layers=2", "ndcg_at_10") == pytest.approx(0.3)
    assert comparison.gain("random", "ndcg_at_10") == pytest.approx(-0.3)
    assert comparison.difference("local head_layers=2", "fedavg", "ndcg_at_10") == pytest.approx([-0.3, -0.3])
    assert list(comparison.to_dict()["rules"]) == [
        *("local head_layers=1", "local head_layers=2", "fedavg head_layers=1", "fedavg head_layers=2", "random")
    ]
    frame = cost_frame(comparison, 10)
    assert frame["rule"].tolist()[0] == "local head_layers=1"
    assert (frame["client"] == "3.00 MB").all()
    assert (frame["server busy"] == "50 %").all()
    axis, points, figures = cost_panels(comparison, 10)
    assert (axis, points) == ("split.head_layers", ["1", "2"])
    assert figures["NDCG@10, mean over clients"] == {
        "local": pytest.approx([0.2, 0.4]), "fedavg": pytest.approx([0.3, 0.7])
    }  # fmt: skip
