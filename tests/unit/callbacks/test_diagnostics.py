"""Figures of a round's aggregation: derived from the adapters themselves, not from inner products."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fellrec.aggregation import FedAvg, FedProx, FELLRec
from fellrec.callbacks.diagnostics import Diagnostics, cosines_to_mean, drift
from fellrec.callbacks.matrices import Matrices
from fellrec.federated.records import Aggregated, FitStart, RoundRecord, SumsOnly, Updates
from fellrec.functional.mixing import gram_matrix


class Log:
    """Keeps what is logged."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.metrics, self.artifacts = run_dir, dict[int, dict[str, float]](), list[Path]()

    def log_metrics(self, metrics: dict[str, float], step: int, once: str) -> None:
        self.metrics[step] = metrics

    def log_artifact(self, path: Path, folder: str = "") -> None:
        self.artifacts.append(path)


def updates(seed: int = 0, num_clients: int = 4) -> Updates:
    generator = torch.Generator().manual_seed(seed)
    start = {"a": torch.randn(1, 3, generator=generator).expand(num_clients, 3).clone()}
    end = {"a": start["a"] + torch.randn(num_clients, 3, generator=generator)}
    clients = tuple(range(1, num_clients + 1))
    return Updates(clients, start, end, torch.ones(num_clients).double(), torch.arange(1.0, num_clients + 1).double())


def test_drift_and_cosines_are_those_of_the_vectors() -> None:
    given = updates()
    end, change = given.end["a"].double().numpy(), (given.end["a"] - given.start["a"]).double().numpy()
    spread = np.sqrt(((end - end.mean(0)) ** 2).sum(1).mean())
    assert drift(gram_matrix(given.end), gram_matrix(given.end, given.start)) == pytest.approx(
        spread / np.linalg.norm(change.mean(0)), rel=1e-6
    )
    expected = change @ change.mean(0) / np.linalg.norm(change, axis=1) / np.linalg.norm(change.mean(0))
    np.testing.assert_allclose(cosines_to_mean(gram_matrix(given.end, given.start)).numpy(), expected, rtol=1e-6)
    assert cosines_to_mean(torch.zeros(2, 2).double()).tolist() == [0.0, 0.0]
    assert drift(torch.ones(2, 2), torch.zeros(2, 2)) == 0.0


@pytest.mark.parametrize(
    ("rule", "expected"),
    [(FedAvg(), 10**2 / 30), (FedProx(), 10**2 / 30), (FedProx(weights="equal"), 4.0)],
    ids=["matrix", "weights", "equal"],
)
def test_effective_senders(rule: Any, expected: float, tmp_path: Path) -> None:
    """Weights 1:2:3:4 have (Σw)² / Σw² = 100 / 30; equal ones as many as there are clients."""
    log, given = Log(tmp_path), updates()
    diagnostics = Diagnostics(log)  # type: ignore[arg-type]
    diagnostics.on_round_start(3)
    diagnostics.on_aggregate_start(given)
    diagnostics.on_aggregate_end(rule.aggregate(given, 3))
    assert log.metrics[3]["aggregation/effective_senders"] == pytest.approx(expected)
    assert {f"aggregation/cosine_to_mean/client/{c:02d}" for c in given.clients} < log.metrics[3].keys()


def test_adapters_that_a_rule_may_not_read_are_measured_too(tmp_path: Path) -> None:
    given = updates()
    hidden = Updates(
        given.clients, SumsOnly(given.start, "x"), SumsOnly(given.end, "x"), given.losses, given.num_samples
    )
    logs = [Log(tmp_path), Log(tmp_path)]
    for log, seen in zip(logs, (given, hidden), strict=True):
        diagnostics = Diagnostics(log)  # type: ignore[arg-type]
        diagnostics.on_aggregate_start(seen)
        diagnostics.on_aggregate_end(Aggregated({}))
    assert logs[0].metrics == logs[1].metrics
    assert logs[0].metrics[0]["aggregation/drift"] > 0


def test_a_round_that_is_left_out_and_a_single_client_have_no_figures(tmp_path: Path) -> None:
    log = Log(tmp_path)
    diagnostics = Diagnostics(log, every=2)  # type: ignore[arg-type]
    for round_index, given in enumerate((updates(num_clients=1), updates())):
        diagnostics.on_round_start(round_index)
        diagnostics.on_aggregate_start(given)
        diagnostics.on_aggregate_end(Aggregated({}))
    assert not log.metrics


def rounds(callback: Matrices, cohorts: list[tuple[int, ...]], first: int = 0) -> None:
    for round_index, cohort in enumerate(cohorts, start=first):
        given = updates(seed=round_index, num_clients=len(cohort))
        found = FELLRec().aggregate(given, round_index)
        callback.on_round_end(RoundRecord(round_index, (), found, None, 0.0, clients=cohort))


def test_matrices_of_all_rounds_are_one_file_and_one_figure(tmp_path: Path) -> None:
    log = Log(tmp_path)
    callback = Matrices(log, heat_maps=[1])  # type: ignore[arg-type]
    callback.on_fit_start(FitStart(3, 0, 5))
    rounds(callback, [(0, 1, 2), (1, 4), (0, 2, 4)])
    callback.on_fit_end(SimpleNamespace())  # type: ignore[arg-type]
    found = np.load(tmp_path / "matrices.npz")
    assert found["clients"].tolist() == [[0, 1, 2], [1, 4, -1], [0, 2, 4]]
    expected = FELLRec().aggregate(updates(seed=1, num_clients=2), 1).matrices["mixing"].numpy()
    assert np.array_equal(found["mixing"][1, :2, :2], expected)
    assert np.isnan(found["mixing"][1, 2]).all()
    names = [str(path.relative_to(tmp_path)) for path in log.artifacts]
    assert names == [
        *("heat_maps/mixing_00001.png", "heat_maps/similarity_00001.png"),
        *("matrices.npz", "matrices.png"),
    ]
    assert all(path.stat().st_size > 500 for path in log.artifacts)


def test_a_resumed_run_writes_the_same_file(tmp_path: Path) -> None:
    """The stopped run had begun the round that the resumed one repeats."""
    files = []
    for stops in (False, True):
        folder = tmp_path / str(stops)
        folder.mkdir()
        callback = Matrices(Log(folder))  # type: ignore[arg-type]
        callback.on_fit_start(FitStart(3, 0, 5))
        rounds(callback, [(0, 1, 2), (1, 4)])
        if stops:
            callback = Matrices(Log(folder))  # type: ignore[arg-type]
            callback.on_fit_start(FitStart(3, 1, 5))
            rounds(callback, [(1, 4)], first=1)
        rounds(callback, [(0, 2, 4)], first=2)
        callback.on_fit_end(SimpleNamespace())  # type: ignore[arg-type]
        files.append((folder / "matrices.npz").read_bytes())
    assert files[0] == files[1]
