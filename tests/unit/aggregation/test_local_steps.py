"""SCAFFOLD and FedNova: rounds on quadratic losses, repeated in NumPy, and laws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import fake_loop, resumed
from quadratic import CURVATURES, RATE, SAMPLES, STEPS, TARGETS, QuadraticExecutor

from fellrec.aggregation import FedAvg, FedNova, Scaffold
from fellrec.aggregation.scaffold import ControlVariates
from fellrec.errors import TrainingError
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.records import Updates
from fellrec.federated.terms import TermContext
from fellrec.functional.participation import cohort

Make = Callable[..., Updates]
T, H = np.array(TARGETS), CURVATURES


def quadratic_loop(rule: Any, clip: float = 1.0, **how: Any) -> FederatedLoop:
    return fake_loop(rule, QuadraticExecutor(rule, clip), num_clients=3, **how)


def scaffold(cohorts: Sequence[Sequence[int]], clip: float = 1.0, rate: float = 1.0) -> tuple[Any, Any, Any]:
    """The algorithm with c_k⁺ as the mean of the raw gradients: the model, c, and all c_k."""
    w, c, own = np.zeros(2), np.zeros(2), np.zeros((3, 2))
    for clients in cohorts:
        moves, changes = [], []
        for k in clients:
            y, gradients = w.copy(), []
            for _ in range(STEPS[k]):
                gradients.append(H[k] * (y - T[k]))
                y = y - RATE * clip * (gradients[-1] - own[k] + c)
            moves.append(y - w)
            changes.append(np.mean(gradients, axis=0) - own[k])
        for k, change in zip(clients, changes, strict=True):
            own[k] += change
        w = w + rate * np.mean(moves, axis=0)
        c = c + np.sum(changes, axis=0) / 3
    return w, c, own


@pytest.mark.parametrize("how", [{}, {"clip": 0.5}, {"rate": 0.7}])
def test_scaffold_is_the_papers_algorithm(how: dict[str, float]) -> None:
    rule = Scaffold(server_learning_rate=how.get("rate", 1.0))
    loop = quadratic_loop(rule, how.get("clip", 1.0))
    loop.run()
    w, c, own = scaffold([range(3)] * 3, **how)
    np.testing.assert_allclose(loop.population.bank.row(1)["a"], w, rtol=0, atol=1e-6)
    np.testing.assert_allclose(rule.state_dict()["b"], c, rtol=0, atol=1e-6)
    np.testing.assert_allclose(loop.population.tensors_of(2)["control|a"], own[2], rtol=0, atol=1e-6)


def test_absent_clients_keep_their_variate_and_get_the_servers_newest(tmp_path: Path) -> None:
    """Cohorts of two of three clients: c changes by a third of the sum, not by a half; stopped after two rounds."""
    how: dict[str, Any] = {"participation": {"rate": 0.6}}
    cohorts = [cohort(3, 0.6, 0, round_index) for round_index in range(4)]
    assert len({*cohorts}) > 1
    assert {len(c) for c in cohorts} == {2}
    first = quadratic_loop(Scaffold(), num_rounds=2, **how)
    first.run()
    rule = Scaffold()
    loop = resumed(first, tmp_path, rule=rule, executor=QuadraticExecutor(rule), num_clients=3, num_rounds=4, **how)
    loop.run()
    w, c, own = scaffold(cohorts)
    np.testing.assert_allclose(loop.population.bank.row(0)["a"], w, rtol=0, atol=1e-6)
    np.testing.assert_allclose(rule.state_dict()["a"], c, rtol=0, atol=1e-6)
    for k in range(3):
        np.testing.assert_allclose(loop.population.tensors_of(k)["control|b"], own[k], rtol=0, atol=1e-6)


def test_with_sgd_the_mean_gradient_is_the_papers_option_two() -> None:
    """Option II: c_k − c + (w − w_k) / (K η), for the third round of the algorithm above."""
    w, c, own = scaffold([range(3)] * 2)
    k, y, gradients = 1, w.copy(), []
    for _ in range(STEPS[k]):
        gradients.append(H[k] * (y - T[k]))
        y = y - RATE * (gradients[-1] - own[k] + c)
    np.testing.assert_allclose(np.mean(gradients, axis=0), own[k] - c + (w - y) / (STEPS[k] * RATE), rtol=1e-12)


def test_scaffold_moves_towards_the_optimum_of_all_clients_where_fedavg_does_not() -> None:
    """The plain mean of three losses of different curvature, from clients with different numbers of steps."""
    best = np.average(T, axis=0, weights=H)
    rule = Scaffold()
    loop = quadratic_loop(rule, num_rounds=80)
    loop.run()
    np.testing.assert_allclose(loop.population.bank.row(0)["a"], best, rtol=0, atol=1e-3)


def test_the_traffic_of_variates_is_in_the_ledger() -> None:
    """Adapters of 16 bytes, and as much again for the variate, in both directions."""
    loop = quadratic_loop(Scaffold(), num_rounds=1)
    loop.run()
    for direction in ("up", "down"):
        assert loop.exchange.ledger.total(direction=direction, kind="adapter") == 3 * 2 * 16


def test_variates_correct_the_gradient_in_place_and_are_of_the_raw_one() -> None:
    context = TermContext({}, {"control": {"a": torch.tensor([3.0])}}, {"control": {"a": torch.tensor([1.0])}})
    term, gradients = ControlVariates(), {"a": torch.tensor([5.0]), "new": torch.tensor([2.0])}
    term.correct(gradients, context)
    assert {name: g.tolist() for name, g in gradients.items()} == {"a": [7.0], "new": [2.0]}
    context.num_steps = 1
    assert {n: t.tolist() for n, t in term.finish({}, context)["control"].items()} == {"a": [5.0], "new": [2.0]}
    assert term.finish({}, TermContext({})) == {"control": {}}, "no step was taken"


def test_fednova_is_the_papers_normalised_mean() -> None:
    """Two rounds: ``w + Σ p_k K_k · Σ p_k (w_k − w) / K_k``."""
    loop = quadratic_loop(FedNova(), num_rounds=2)
    loop.run()
    w, p = np.zeros(2), np.array(SAMPLES) / sum(SAMPLES)
    for _ in range(2):
        ends = []
        for k in range(3):
            y = w.copy()
            for _ in range(STEPS[k]):
                y = y - RATE * H[k] * (y - T[k])
            ends.append((y - w) / STEPS[k])
        w = w + (p * STEPS).sum() * np.einsum("k,ki->i", p, np.stack(ends))
    np.testing.assert_allclose(loop.population.bank.row(0)["a"], w, rtol=0, atol=1e-6)


def test_fednova_with_equal_steps_is_fedavg(make_updates: Make) -> None:
    updates = replace(make_updates(), num_steps=torch.full((4,), 7.0))
    expected = FedAvg().aggregate(updates, 0).adapters
    for name, tensor in FedNova().aggregate(updates, 0).adapters.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_fednova_without_steps(make_updates: Make) -> None:
    """A client that took no step has no update to divide; unknown numbers are refused."""
    updates = replace(make_updates(2), num_steps=torch.tensor([0.0, 4.0]), num_samples=torch.tensor([1.0, 1.0]))
    assert FedNova().update_weights(updates, 0).tolist() == [0.0, 0.25]
    assert FedNova().update_weights(replace(updates, num_steps=torch.zeros(2)), 0).tolist() == [0.0, 0.0]
    with pytest.raises(TrainingError, match="aggregation fednova needs the clients' numbers of local steps"):
        FedNova().update_weights(make_updates(), 0)
