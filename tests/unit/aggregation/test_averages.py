"""FedProx, FedAvgM, FedAdagrad, FedAdam and FedYogi: derivations in NumPy, laws, and Flower's rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fellrec.aggregation import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Uniform
from fellrec.aggregation.fedprox import Proximal
from fellrec.errors import ConfigError, TrainingError
from fellrec.federated.records import Updates
from fellrec.federated.terms import TermContext

Make = Callable[..., Updates]


def rounds_of(rule: Any, make: Make, num_rounds: int = 3) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Run a rule; gives parameter ``a`` of the shared model before each round and after the last, and mean updates."""
    models, means = [], []
    shared = None
    for round_index in range(num_rounds):
        updates = make(seed=round_index)
        if shared is not None:
            moved = {n: updates.end[n] - updates.start[n] for n in shared}
            start = {n: shared[n].expand_as(updates.end[n]).clone() for n in shared}
            end = {n: start[n] + moved[n] for n in shared}
            updates = Updates(updates.clients, start, end, updates.losses, updates.num_samples)
        p = (updates.num_samples / updates.num_samples.sum()).numpy()
        change = (updates.end["a"].double() - updates.start["a"].double()).numpy()
        models.append(updates.start["a"][0].double().numpy())
        means.append(np.einsum("n,nij->ij", p, change))
        shared = {n: t[:1] for n, t in rule.aggregate(updates, round_index).adapters.items()}
    return [*models, shared["a"][0].double().numpy()], means


def test_fedavgm_is_the_recursion_of_the_paper(make_updates: Make) -> None:
    models, means = rounds_of(FedAvgM(momentum=0.9, server_learning_rate=0.5), make_updates)
    u = np.zeros_like(means[0])
    for before, after, mean in zip(models, models[1:], means):
        u = 0.9 * u + mean
        np.testing.assert_allclose(after, before + 0.5 * u, rtol=0, atol=1e-6)


def test_fedavgm_without_momentum_is_fedavg(make_updates: Make) -> None:
    updates = make_updates()
    expected = FedAvg().aggregate(updates, 0).adapters
    for name, tensor in FedAvgM(momentum=0.0).aggregate(updates, 0).adapters.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7)


@pytest.mark.parametrize("rule", [FedAdagrad, FedAdam, FedYogi])
def test_adaptive_rules_are_the_recursions_of_the_paper(rule: Any, make_updates: Make) -> None:
    """Algorithm 2 of Reddi et al., from v = τ², in NumPy."""
    settings = {"server_learning_rate": 0.01, "beta1": 0.8, "tau": 1e-3}
    models, means = rounds_of(rule(**settings), make_updates)
    m, v = np.zeros_like(means[0]), np.full_like(means[0], 1e-6)
    for before, after, mean in zip(models, models[1:], means):
        m = 0.8 * m + 0.2 * mean
        v = {
            FedAdagrad: v + mean**2,
            FedAdam: 0.99 * v + 0.01 * mean**2,
            FedYogi: v - 0.01 * mean**2 * np.sign(v - mean**2),
        }[rule]
        np.testing.assert_allclose(after, before + 0.01 * m / (np.sqrt(v) + 1e-3), rtol=0, atol=1e-6)


def test_fedprox_is_fedavg_at_the_server(make_updates: Make) -> None:
    updates = make_updates()
    for weights, other in (("samples", FedAvg()), ("equal", Uniform())):
        expected = other.aggregate(updates, 0).adapters
        for name, tensor in FedProx(weights=weights).aggregate(updates, 0).adapters.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7)


def test_the_proximal_gradient_is_mu_times_the_distance() -> None:
    """No factor 2, and none at the received adapter."""
    value = torch.nn.Parameter(torch.tensor([1.0, 5.0]))
    context = TermContext({"a": torch.tensor([1.0, 2.0])})
    loss = Proximal(0.1).loss({"a": value}, context)
    assert loss is not None
    loss.backward()
    torch.testing.assert_close(value.grad, torch.tensor([0.0, 0.3]))
    assert Proximal(0.0).loss({"a": value}, context) is None


@pytest.mark.parametrize("rule", [FedProx(), FedAvgM(), FedAdagrad(), FedAdam(), FedYogi()])
def test_different_starts_are_refused_by_name(rule: Any, make_updates: Make) -> None:
    updates = make_updates()
    updates.start["a"][1] += 1
    with pytest.raises(TrainingError, match=rf"aggregation {rule.name} needs clients that start a round with the same"):
        rule.aggregate(updates, 0)


@pytest.mark.parametrize("rule", [FedAvgM, FedAdagrad, FedAdam, FedYogi])
def test_state_goes_through_a_checkpoint(rule: Any, make_updates: Make) -> None:
    whole, first, second = rule(), rule(), rule()
    whole.aggregate(make_updates(seed=1), 0)
    first.aggregate(make_updates(seed=1), 0)
    second.load_state_dict(first.state_dict())
    results = [r.aggregate(make_updates(seed=2), 1).adapters for r in (whole, second)]
    for name in results[0]:
        assert torch.equal(results[0][name], results[1][name])
    assert not torch.equal(rule().aggregate(make_updates(seed=2), 1).adapters["a"], results[0]["a"])


@pytest.mark.parametrize("setting", ["beta1", "server_learning_rate", "tau"])
def test_settings_that_a_common_base_names_have_their_ranges(setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"aggregation.{setting}=-1.0 is not allowed"):
        FedAdam(**{setting: -1.0})
