"""FedAsync and FedBuff against their equations in NumPy, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fellrec.aggregation import FedAsync, FedBuff
from fellrec.errors import ConfigError, TrainingError
from fellrec.federated.records import Updates

GENERATOR = torch.Generator().manual_seed(5)
MODEL = {"a": torch.randn(2, 3, generator=GENERATOR), "b": torch.randn(4, generator=GENERATOR)}


def updates(start_rounds: tuple[int, ...], has_model: bool = True) -> Updates:
    """Clients whose starts differ from the server's model and from each other."""
    num = len(start_rounds)
    stacks = [{name: torch.randn(num, *t.shape, generator=GENERATOR) for name, t in MODEL.items()} for _ in range(2)]
    numbers = torch.ones(num, dtype=torch.float64)
    model = MODEL if has_model else {}
    return Updates(tuple(range(num)), *stacks, numbers, numbers, start_rounds=start_rounds, model=model)


def test_fedbuff_is_its_equation() -> None:
    """W + η_s/K Σ (1 + d_k)^-1/2 Δ_k, at round 7."""
    found = updates((7, 4, 5))
    result = FedBuff(server_learning_rate=0.3).aggregate(found, 7)
    scale = 0.3 / 3 / np.sqrt(1 + np.array([0.0, 3.0, 2.0]))
    for name, model in MODEL.items():
        change = (found.end[name] - found.start[name]).double().numpy()
        expected = model.double().numpy() + np.tensordot(scale, change, axes=1)
        np.testing.assert_allclose(result.adapters[name][0].numpy(), expected, rtol=2e-6)
    np.testing.assert_allclose(result.per_client["update_weight"], scale)


@pytest.mark.parametrize(
    ("how", "scale"),
    [
        ({"staleness": "constant"}, lambda d: 1.0),
        ({}, lambda d: (1 + d) ** -0.5),
        ({"decay": 2.0}, lambda d: (1 + d) ** -2.0),
        ({"staleness": "hinge"}, lambda d: 1.0 if d <= 4 else 1 / (10 * (d - 4) + 1)),
        ({"staleness": "hinge", "decay": 0.5, "tolerance": 0}, lambda d: 1 / (0.5 * d + 1)),
    ],
)
@pytest.mark.parametrize("delay", [0, 4, 6])
def test_fedasync_is_its_equation(how: dict[str, Any], scale: Any, delay: int) -> None:
    """(1 − a) w + a w_k with a = α s(d)."""
    found = updates((20 - delay,))
    result = FedAsync(alpha=0.7, **how).aggregate(found, 20)
    a = 0.7 * scale(delay)
    for name, model in MODEL.items():
        expected = (1 - a) * model.double().numpy() + a * found.end[name][0].double().numpy()
        np.testing.assert_allclose(result.adapters[name][0].numpy(), expected, rtol=2e-6, atol=1e-7)


def test_fedasync_moves_by_the_mean_of_updates_that_arrive_at_the_same_time() -> None:
    found = updates((3, 1, 3))
    result = FedAsync().aggregate(found, 3)
    a = 0.6 / np.sqrt([1, 3, 1])
    for name, model in MODEL.items():
        towards = found.end[name].double().numpy() - model.double().numpy()
        expected = model.double().numpy() + np.tensordot(a / 3, towards, axes=1)
        np.testing.assert_allclose(result.adapters[name][0].numpy(), expected, rtol=2e-6, atol=1e-7)


def test_a_fresh_update_with_weight_one_is_the_clients_model() -> None:
    found = updates((2,))
    result = FedAsync(alpha=1.0).aggregate(found, 2)
    for name in MODEL:
        torch.testing.assert_close(result.adapters[name], found.end[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", [FedAsync(), FedBuff()])
def test_different_starts_without_a_model_of_the_server_are_refused(rule: Any) -> None:
    with pytest.raises(TrainingError, match=f"aggregation {rule.name} needs clients that start a round with the same"):
        rule.aggregate(updates((0, 0), has_model=False), 0)


def test_the_default_buffer_is_the_papers_or_all_that_train() -> None:
    assert [FedBuff().buffer_of(number) for number in (3, 10, 50)] == [3, 10, 10]
    assert FedBuff(buffer_size=7).buffer_of(3) == 7
    assert FedAsync().buffer_of(50) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FedAsync(alpha=0), r"aggregation.alpha=0 is not allowed: a number in \(0, 1\]"),
        (lambda: FedAsync(staleness="linear"), "constant, polynomial or hinge"),
        (lambda: FedAsync(decay=-1), "aggregation.decay=-1 is not allowed"),
        (lambda: FedBuff(buffer_size=0), "aggregation.buffer_size=0 is not allowed: a whole number of at least 1"),
        (lambda: FedBuff(server_learning_rate=0), "aggregation.server_learning_rate=0 is not allowed"),
    ],
)
def test_bad_settings_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_combinations_that_need_a_cohort_are_refused() -> None:
    sampler = {"_target_": "fellrec.federated.samplers.PowerOfChoiceSampler"}
    config = {"participation": {"sampler": sampler, "over_selection": 1.3}}
    found = "\n".join(FedBuff.limits.problems("fedbuff", config))
    assert "aggregation fedbuff is asynchronous and has no cohort to choose by loss: participation=power_of" in found
    assert (
        "aggregation fedbuff is asynchronous, the server waits for no cohort: participation.over_selection=1.3" in found
    )
