"""Fed-SB and RAVAN: exactness by its identity in NumPy, what averaging heads and factors apart misses, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fellrec.aggregation import RAVAN, FedAvg, FedSB
from fellrec.aggregation.settings import RULES
from fellrec.config.compose import compose
from fellrec.errors import ConfigError
from fellrec.federated.records import Updates

OUT, IN, RANK, HEADS, SCALE = 7, 9, 2, 3, 1.5


def round_of(num_heads: int, num_clients: int = 4, seed: int = 0) -> Updates:
    """What a rule sees of clients with one layer, ``[7, 9]``, and one more parameter."""
    random = np.random.default_rng(seed)
    shapes = {"x.lora_cores": (num_heads, RANK, RANK), "norm": (5,)}
    if num_heads > 1:
        shapes["x.lora_scales"] = (num_heads,)
    end = {n: torch.from_numpy(random.standard_normal((num_clients, *shape))).float() for n, shape in shapes.items()}
    start = {n: t[:1].expand(t.shape).clone() for n, t in end.items()}
    samples = torch.from_numpy(random.integers(1, 100, num_clients)).double()
    return Updates(tuple(range(num_clients)), start, end, torch.ones(num_clients).double(), samples)


def change(cores: Any, scales: Any) -> np.ndarray[Any, Any]:
    """``s Σ_i s_i B_i H_i A_i`` with random frozen factors, head by head."""
    random = np.random.default_rng(7)
    found = np.zeros((OUT, IN))
    for core, scale in zip(np.asarray(cores, float), np.asarray(scales, float), strict=True):
        b, a = random.standard_normal((OUT, RANK)), random.standard_normal((RANK, IN))
        found += SCALE * scale * b @ core @ a
    return found


@pytest.mark.parametrize("weights", ["samples", "equal"])
@pytest.mark.parametrize(("rule", "num_heads"), [(FedSB, 1), (RAVAN, HEADS)])
def test_the_next_weight_is_the_mean_of_the_clients_weights(rule: Any, num_heads: int, weights: str) -> None:
    updates = round_of(num_heads)
    n = updates.num_samples.numpy()
    p = n / n.sum() if weights == "samples" else np.full(len(n), 1 / len(n))
    ones = torch.ones(len(n), num_heads)
    ends = zip(updates.end["x.lora_cores"], updates.end.get("x.lora_scales", ones), strict=True)
    expected = sum(p_k * change(cores, scales) for p_k, (cores, scales) in zip(p, ends, strict=True))
    made = rule(weights=weights)
    result = made.aggregate(updates, 0)
    next_scales = result.adapters["x.lora_scales"][0] if num_heads > 1 else ones[0]
    assert next_scales.tolist() == [1.0] * num_heads
    np.testing.assert_allclose(change(result.adapters["x.lora_cores"][0], next_scales), expected, atol=1e-5)
    np.testing.assert_allclose(result.adapters["norm"][0], p @ updates.end["norm"].double().numpy(), atol=1e-6)


def test_averaging_heads_and_factors_apart_is_not_exact() -> None:
    updates = round_of(HEADS)
    exact, apart = (rule.aggregate(updates, 0).adapters for rule in (RAVAN(), FedAvg()))
    found = [change(adapters["x.lora_cores"][0], adapters["x.lora_scales"][0]) for adapters in (exact, apart)]
    assert np.abs(found[0] - found[1]).max() > 0.1 * np.abs(found[0]).max()


def test_only_the_moments_of_factors_are_forgotten() -> None:
    assert RAVAN().aggregate(round_of(HEADS), 0).resets == ("x.lora_scales",)
    assert FedSB().aggregate(round_of(1), 0).resets == ()


def test_clients_that_do_not_move_keep_the_weight() -> None:
    updates = round_of(HEADS)
    still = Updates(updates.clients, updates.start, updates.start, updates.losses, updates.num_samples)
    result = RAVAN().aggregate(still, 0).adapters
    before = change(updates.start["x.lora_cores"][0], updates.start["x.lora_scales"][0])
    np.testing.assert_allclose(change(result["x.lora_cores"][0], result["x.lora_scales"][0]), before, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "adapter", "message"),
    [
        ("FedSB", "LoraAdapter", "aggregation fed_sb needs adapter=lora_sb: adapter=lora is not allowed"),
        ("FedSB", "LoraHeadsAdapter", "aggregation fed_sb needs adapter=lora_sb"),
        ("RAVAN", "LoraSBAdapter", "aggregation ravan needs adapter=lora_heads: adapter=lora_sb is not allowed"),
        ("RAVAN", "FullAdapter", "aggregation ravan needs adapter=lora_heads: adapter=full is not allowed"),
        ("FFALoRA", "LoraSBAdapter", "aggregation ffa_lora needs LoRA's factors: adapter=lora_sb is"),
        ("FedExLoRA", "LoraHeadsAdapter", "aggregation fedex_lora needs LoRA's factors"),
    ],
)
def test_another_adapter_is_refused_by_name(rule: str, adapter: str, message: str) -> None:
    limits, name = RULES[rule].about.limits, RULES[rule].about.name
    assert message in " ".join(limits.problems(name, {"adapter": {"_target_": f"some.module.{adapter}"}}))


@pytest.mark.parametrize("setting", ["path=somewhere", "rank=[2,4]"])
def test_what_plain_lora_has_and_these_adapters_have_not_is_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"adapter.{setting.partition('=')[0]}"):
        compose(["aggregation=fed_sb", "adapter=lora_sb", f"adapter.{setting}"])
