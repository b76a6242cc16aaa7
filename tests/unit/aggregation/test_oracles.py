"""Rules against other libraries, on eleven clients of which one is far away.

``quadprog`` is called here. Results of flwr 1.42.0, byzfl 0.0.11 and fluke-fl 0.8.1 are read from ``oracles.json``, which
``make_oracles.py`` writes; its docstring says why these are not installed. Known differences:

- Flower's FedAdagrad, FedAdam and FedYogi start v at 0, these rules at τ²: here v is set to 0. Flower's FedAdam
  multiplies the learning rate by ``√(1 − β₂^{t+1}) / (1 − β₁^{t+1})``, t from 1, these rules do not: here the learning
  rates of the rounds are those.
- Flower's Multi-Krum weighs the selected clients by their samples: here all have one. Its trimmed mean takes a fraction
  f / N, rounded down.
- Flower's q-FedAvg adds 1e-10 to losses.
- Of two clients that are nearest to each other, and have one score, Flower's Bulyan takes the first, this one that which
  is better among all clients: its order of these is replaced here.
- ByzFL's Krum takes N − f − 1 neighbours, this one N − f − 2, as Flower and the paper: ByzFL's is called with f + 1, and
  its Multi-Krum compared with f − 1. Its geometric median stops after 3 steps with ν = 0.1 by default: 1000 and 1e-6.
- fluke's FedNova gives ``Σ p_k τ / τ_k w_k``, whose weights do not sum to 1, instead of a step from w: it is called at
  w = 0 with updates as models, where both are the same.
- fluke's FedAMP has absolute α and σ, this one ``α σ / (N − 1)`` and units of the median squared distance. fluke computes
  in float32 weights ξ.
- fluke's APFL overwrites v by the mixture after every round, and its step of v reads no gradient, as the mixture is a
  copy: ``test_apfl.py`` repeats the paper's rounds in NumPy instead.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fellrec.aggregation import (
    AggregationCallback,
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    FedAdagrad,
    FedAdam,
    FedAMP,
    FedAvg,
    FedAvgM,
    FedNova,
    FedYogi,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormClipping,
    QFedAvg,
    TrimmedMean,
)
from fellrec.federated.records import Updates
from fellrec.functional.fairness import least_norm_weights

FOUND = json.loads(Path(__file__).with_name("oracles.json").read_text())
GIVEN, RESULTS = FOUND["inputs"], FOUND["results"]
START, CHANGES = np.array(GIVEN["start"]), np.array(GIVEN["updates"])
N, F = CHANGES.shape[1], 2


def updates_of(model: np.ndarray, changes: np.ndarray) -> Updates:
    start = torch.tensor(model).repeat(N, 1)
    losses = torch.tensor(GIVEN["losses"], dtype=torch.float64)
    samples, steps = (torch.tensor(GIVEN[key], dtype=torch.float64) for key in ("samples", "steps"))
    return Updates(tuple(range(N)), {"a": start}, {"a": start + torch.tensor(changes)}, losses, samples,
                   start_losses=losses, num_steps=steps, num_clients=N)  # fmt: skip


def moved(rule: AggregationCallback, model: np.ndarray, round_index: int = 0) -> np.ndarray:
    """The shared model after a round that starts from ``model``."""
    rule.begin({"a": torch.tensor(model)})
    found: np.ndarray = rule.aggregate(updates_of(model, CHANGES[round_index]), round_index).adapters["a"][0].numpy()
    return found


FLOWER = {
    "fedavg": FedAvg(),
    "median": CoordinateMedian(byzantine=F),
    "trimmed_mean": TrimmedMean(byzantine=F),
    "krum": Krum(byzantine=F),
    "multi_krum": MultiKrum(byzantine=F),
    "qfedavg": QFedAvg(q=0.7, lipschitz=2.0),
}
BYZFL = {
    "median": CoordinateMedian(byzantine=F),
    "trimmed_mean": TrimmedMean(byzantine=F),
    "krum": Krum(byzantine=F),
    "multi_krum": MultiKrum(byzantine=F - 1, num_selected=N - F),
    "geometric_median": GeometricMedian(byzantine=F),
    "centered_clipping": CenteredClipping(byzantine=F, radius=1.5, num_steps=3),
    "norm_clipping": NormClipping(byzantine=F, max_norm=1.5),
}


@pytest.mark.parametrize("name", FLOWER)
def test_a_round_is_flowers(name: str) -> None:
    np.testing.assert_allclose(moved(FLOWER[name], START), RESULTS["flwr"][name], rtol=0, atol=1e-8)


def test_bulyan_is_flowers_where_the_first_of_equal_scores_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fellrec.functional.robust.krum_order", lambda distances, byzantine: list(range(len(distances)))
    )
    np.testing.assert_allclose(moved(Bulyan(byzantine=F), START), RESULTS["flwr"]["bulyan"], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", BYZFL)
def test_a_round_is_byzfls(name: str) -> None:
    expected = START + np.array(RESULTS["byzfl"][name])
    np.testing.assert_allclose(moved(BYZFL[name], START), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("step", ["nnm", "arc"])
def test_a_step_before_a_rule_is_byzfls(step: str) -> None:
    changed = np.sort(RESULTS["byzfl"][step], axis=0)
    expected = START + changed[F:-F].mean(axis=0)
    np.testing.assert_allclose(moved(TrimmedMean(byzantine=F, before=(step,)), START), expected, rtol=0, atol=1e-8)


OPTIMISERS = {
    "fedavgm": FedAvgM(server_learning_rate=0.5, momentum=0.8),
    "fedadagrad": FedAdagrad(server_learning_rate=0.1, beta1=0.0, tau=1e-3),
    "fedadam": FedAdam(server_learning_rate=0.1, beta1=0.9, beta2=0.99, tau=1e-3),
    "fedyogi": FedYogi(server_learning_rate=0.1, beta1=0.9, beta2=0.99, tau=1e-3),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_three_rounds_are_flowers(name: str) -> None:
    rule, model = OPTIMISERS[name], START
    state: dict[str, Any] = (
        {} if name == "fedavgm" else {"first": {}, "second": {"a": torch.zeros(len(START)).double()}}
    )
    for t, expected in enumerate(RESULTS["flwr"][name], start=1):
        now = rule
        if name == "fedadam":
            now = dataclasses.replace(
                rule, server_learning_rate=0.1 * np.sqrt(1 - 0.99 ** (t + 1)) / (1 - 0.9 ** (t + 1))
            )
        now.load_state_dict(state)
        model = moved(now, model, t - 1)
        state = now.state_dict()
        np.testing.assert_allclose(model, expected, rtol=0, atol=1e-10)


def test_a_round_of_fednova_is_flukes() -> None:
    np.testing.assert_allclose(moved(FedNova(), 0 * START), RESULTS["fluke-fl"]["fednova"], rtol=0, atol=1e-6)


def test_the_mixtures_of_fedamp_are_flukes() -> None:
    squares = ((CHANGES[0][:, None] - CHANGES[0][None]) ** 2).sum(-1)
    median = np.median(squares[np.triu_indices(N, 1)])
    rule = FedAMP(attention=0.5 / 9.0 * (N - 1), sigma=9.0 / median)
    found = rule.aggregate(updates_of(0 * START, CHANGES[0]), 0).tensors["cloud"]["a"]
    np.testing.assert_allclose(found, RESULTS["fluke-fl"]["fedamp"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.05, 0.3, 1.0])
def test_the_weights_of_fedmgda_are_quadprogs(epsilon: float) -> None:
    """``min λᵀ G λ`` with ``Σ λ = 1`` and ``max(0, p − ε) ≤ λ ≤ min(1, p + ε)``, G of unit updates."""
    from quadprog import solve_qp

    unit = CHANGES[1, :5] / np.linalg.norm(CHANGES[1, :5], axis=1, keepdims=True)  # 5 of 6 entries: G is regular
    gram, shares = unit @ unit.T, np.array(GIVEN["samples"][:5]) / sum(GIVEN["samples"][:5])
    low, high = np.maximum(0, shares - epsilon), np.minimum(1, shares + epsilon)
    matrix = np.concatenate([np.ones((5, 1)), np.eye(5), -np.eye(5)], axis=1)
    expected = solve_qp(2 * gram, np.zeros(5), matrix, np.concatenate([[1.0], low, -high]), meq=1)[0]
    found = least_norm_weights(torch.tensor(gram), torch.tensor(shares), epsilon)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
