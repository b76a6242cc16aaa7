"""LoRA's factors in real local training: a half that is frozen, moments that are forgotten, exactness of a whole round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fellrec.config.compose import compose
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import build_federation

HOW = ["adapter=lora", "adapter.rank=2", "adapter.alpha=5", "adapter.dropout=0", "trainer.max_local_steps=2",
       "trainer.learning_rate=0.1", "trainer.weight_decay=0.5"]  # fmt: skip

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def recommender(tiny_overrides: list[str]) -> Recommender:
    config = compose([*tiny_overrides, *HOW])
    return build_recommender(config, build_data(config))


@pytest.fixture
def make(recommender: Recommender, tiny_overrides: list[str]) -> Make:
    """The parts of a run over the module's one recommender."""

    def build(*overrides: str) -> Any:
        return build_federation(compose([*tiny_overrides, *HOW, *overrides]), recommender)

    return build


def factor(name: str) -> str:
    return "A" if "lora_A" in name else "B"


@pytest.mark.parametrize(
    ("rule", "round_index", "frozen"),
    [("ffa_lora", 0, "A"), ("fedsvd", 0, "A"), ("rolora", 0, "A"), ("rolora", 1, "B")],
)
def test_a_frozen_half_neither_steps_nor_decays(make: Make, rule: str, round_index: int, frozen: str) -> None:
    """With a weight decay of 0.5 and, in the second round, moments of the frozen half: no bit of either changes."""
    made = make(f"aggregation={rule}")
    loop = made.loop()
    for earlier in range(round_index):
        loop.run_round(earlier)
    before, moments = made.population.bank.row(0), dict(made.population.optimizer_of(0))
    (trained,) = loop.train([made.population.job(0, round_index)])
    after, then = trained.adapter.tensors(), trained.optimizer.tensors()
    for name in before:
        is_equal = torch.equal(before[name], after[name])
        assert is_equal == (factor(name) == frozen), name
    kept = {key: tensor for key, tensor in moments.items() if factor(key) == frozen}
    assert bool(kept) == (round_index > 0)
    assert all(torch.equal(then[key], tensor) for key, tensor in kept.items())
    assert {factor(key) for key in then.keys() - kept.keys()} == {"A", "B"} - {frozen}


@pytest.mark.parametrize(
    ("rule", "remembered"),
    [("fedavg", {"A", "B"}), ("fedex_lora", {"A", "B"}), ("flora", set()), ("flexlora", set()), ("fedsvd", set())],
)
def test_moments_are_forgotten_where_factors_are_new(make: Make, rule: str, remembered: set[str]) -> None:
    """By clients that missed the round too."""
    made = make(f"aggregation={rule}", "participation.rate=0.5")
    loop = made.loop()
    loop.run_round(0)
    loop.run_round(1)
    rows = [row for row in range(3) if row in made.participation.draw(made.population, 1).rows]
    assert len(rows) < 3
    for row in range(3):
        found = {factor(key) for key in made.population.optimizer_of(row)}
        assert found <= remembered
        assert row not in rows or found == remembered


@pytest.mark.parametrize("rule", ["ffa_lora", "rolora", "flora", "fedex_lora", "fedsvd", "fedavg"])
def test_a_round_gives_the_mean_of_the_clients_weights(make: Make, rule: str) -> None:
    """``W + s Σ p_k B_k A_k`` from what clients returned, two rounds one after the other; FedAvg is not exact."""
    made = make(f"aggregation={rule}")
    loop, layers = made.loop(), made.exchange.layers
    assert layers
    for round_index in range(2):
        before = changed_weights(made)
        record = loop.run_round(round_index)
        samples = torch.tensor([t.num_samples for t in record.trained], dtype=torch.float64)
        adapters = [t.adapter.tensors() for t in record.trained]
        found = changed_weights(made)
        served = made.population.bank.row(0)
        worst = 0.0
        for layer in layers:
            change = sum(
                p * layer.scale * adapter[layer.b].double() @ adapter[layer.a].double()
                for p, adapter in zip(samples / samples.sum(), adapters)
            )
            assert layer.scale == 2.5
            new = found[layer.weight] + layer.scale * served[layer.b].double() @ served[layer.a].double()
            worst = max(worst, float((new - before[layer.weight] - change).abs().max()))
        assert (worst > 1e-4) == (rule == "fedavg"), worst


def changed_weights(made: Any) -> dict[str, torch.Tensor]:
    """What was added so far to the frozen weights of the layers that LoRA adapts, ``[out, in]`` float64."""
    found = {}
    for layer in made.exchange.layers:
        shape = made.population.initial.tensors()
        total = torch.zeros(len(shape[layer.b]), shape[layer.a].shape[1], dtype=torch.float64)
        for change in made.population.base:
            factors = change.tensors()
            total += factors[f"{layer.weight}|left"].double() @ factors[f"{layer.weight}|right"].double()
        found[layer.weight] = total
    return found
