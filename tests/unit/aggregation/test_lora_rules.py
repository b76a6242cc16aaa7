"""Rules that treat A and B in different ways: exactness by its identity, closed forms in NumPy, laws, edge cases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from lora_rounds import (
    LAYERS,
    RANK,
    base_weights,
    effective,
    initial_adapter,
    plain,
    products,
    round_of,
    weights_of,
)

import fellrec.aggregation as aggregation
from fellrec.aggregation import (
    RBLA,
    FedAvg,
    FedExLoRA,
    FedRotLoRA,
    FedSALoRA,
    FedSVD,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    LoRAFAIR,
    RoLoRA,
)
from fellrec.aggregation.settings import RULES
from fellrec.errors import TrainingError
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.lora import factor_error

LORA = [name for name, kind in RULES.items() if kind.about.limits.needs_lora]
EXACT = [name for name in LORA if RULES[name].about.is_exact]


def rule_of(name: str, **settings: Any) -> Any:
    return getattr(aggregation, name)(**settings)


def distance(updates: Updates, result: Aggregated, weights: torch.Tensor) -> float:
    """Frobenius norm, over all layers, of the effective weights minus the exact ones."""
    base = base_weights()
    exact = products(updates, weights)
    found = effective(updates, result, base)
    return float(sum((found[n] - plain(base)[n] - exact[n]).square().sum() for n in found) ** 0.5)


def test_there_are_rules_that_claim_to_be_exact() -> None:
    assert set(EXACT) >= {"FFALoRA", "RoLoRA", "FLoRA", "FedExLoRA", "FedSVD"}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("round_index", [0, 1])
@pytest.mark.parametrize("weights", ["samples", "equal"])
@pytest.mark.parametrize("num_clients", [1, 3, 9])
def test_exact_rules_are_exact(name: str, round_index: int, weights: str, num_clients: int) -> None:
    """``W + s Σ p_k B_k A_k``, also where N·r is above both sides of a layer."""
    rule = rule_of(name, weights=weights)
    updates = round_of(rule, round_index, num_clients)
    p = (
        updates.num_samples / updates.num_samples.sum()
        if weights == "samples"
        else torch.full((num_clients,), 1 / num_clients).double()
    )
    base = base_weights()
    found = effective(updates, rule.aggregate(updates, round_index), base)
    for layer in LAYERS:
        expected = plain(base)[layer.weight] + products(updates, p)[layer.weight]
        torch.testing.assert_close(found[layer.weight], expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", LORA)
def test_other_parameters_are_averaged(name: str) -> None:
    rule = rule_of(name)
    updates = round_of(rule)
    expected = torch.tensordot(weights_of(rule, updates), updates.end["norm"].double(), dims=1)
    for row in rule.aggregate(updates, 0).adapters["norm"]:
        torch.testing.assert_close(row.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LORA)
def test_clients_that_do_not_move_keep_the_effective_weights(name: str) -> None:
    for round_index in (0, 1):
        rule = rule_of(name)
        updates = round_of(rule, round_index)
        still = replace(updates, end=updates.start)
        found = effective(still, rule.aggregate(still, round_index), base_weights())
        before = effective(still, Aggregated({}), base_weights())
        for weight in found:
            torch.testing.assert_close(found[weight], before[weight], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", LORA)
def test_a_rule_works_where_b_is_still_zero(name: str) -> None:
    """Nothing is divided by zero, and A stays usable: with both factors 0 a layer could not learn any more."""
    rule = rule_of(name)
    updates = round_of(rule, adapter=initial_adapter(zero_b=True))
    zero = replace(updates, end={n: t * ("lora_B" not in n) for n, t in updates.end.items()})
    result = rule.aggregate(zero, 0)
    personal = {name: t[None] for name, t in initial_adapter(zero_b=True).items()}
    adapter = {**personal, **{n: t[None] for n, t in zero.model.items()}, **zero.end, **result.adapters}
    for layer in LAYERS:
        assert torch.isfinite(adapter[layer.a]).all()
        assert adapter[layer.a].abs().sum(dim=2).min() > 0
        assert not adapter[layer.b].any()


def test_what_averaging_factors_misses_is_the_closed_form() -> None:
    """FedIT, the mean of factors by FedAvg."""
    updates = round_of(FedAvg())
    p = FedAvg().sample_shares(updates)
    exact = products(updates, p)
    expected = factor_error([(x.scale, updates.end[x.a].double(), updates.end[x.b].double()) for x in LAYERS], p)
    norm = float(sum(t.square().sum() for t in exact.values()) ** 0.5)
    assert distance(updates, FedAvg().aggregate(updates, 0), p) / norm == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("round_index", [0, 1, 2, 3])
def test_rolora_begins_with_b(round_index: int) -> None:
    trained = {name for name in initial_adapter() if RoLoRA().trains(name, round_index)}
    half = "lora_A" if round_index % 2 else "lora_B"
    assert trained == {name for name in initial_adapter() if half in name} | {"norm"}


def test_halves_that_stay() -> None:
    """FFA-LoRA trains no A; FedSA-LoRA trains both and sends no B."""
    names = list(initial_adapter())
    assert {n for n in names if not FFALoRA().trains(n, 3)} == {layer.a for layer in LAYERS}
    assert all(FedSALoRA().trains(n, 3) for n in names)
    assert {n for n in names if not FedSALoRA().exchanges(n, 3)} == {layer.b for layer in LAYERS}
    assert set(FedSALoRA().aggregate(round_of(FedSALoRA()), 0).adapters) == {"norm", *(layer.a for layer in LAYERS)}


def test_flora_begins_a_new_adapter_each_round() -> None:
    updates = round_of(FLoRA())
    first, again, later, other = (
        rule.aggregate(updates, t) for rule, t in ((FLoRA(), 0), (FLoRA(), 0), (FLoRA(), 1), (FLoRA(seed=1), 0))
    )
    for layer in LAYERS:
        assert not first.adapters[layer.b].any()
        drawn = first.adapters[layer.a][0]
        assert drawn.abs().max() <= drawn.shape[1] ** -0.5
        assert drawn.abs().max() > 0
        assert torch.equal(drawn, again.adapters[layer.a][0])
        assert not torch.equal(drawn, later.adapters[layer.a][0])
        assert not torch.equal(drawn, other.adapters[layer.a][0])
    assert set(first.resets) == {name for layer in LAYERS for name in (layer.a, layer.b)}


def test_fedex_has_the_means_of_factors() -> None:
    updates = round_of(FedExLoRA())
    expected = FedAvg().aggregate(updates, 0).adapters
    result = FedExLoRA().aggregate(updates, 0)
    for name in expected:
        torch.testing.assert_close(result.adapters[name], expected[name], rtol=0, atol=1e-6)
    assert result.resets == ()


@pytest.mark.parametrize("num_clients", [1, 3])
def test_flexlora_is_numpys_truncated_svd(num_clients: int) -> None:
    updates = round_of(FlexLoRA(), num_clients=num_clients)
    p = weights_of(FlexLoRA(), updates)
    result = FlexLoRA().aggregate(updates, 0)
    cut = whole = 0.0
    for layer in LAYERS:
        u, s, vh = np.linalg.svd(products(updates, p)[layer.weight].numpy(), full_matrices=False)
        found = layer.scale * result.adapters[layer.b][0].double() @ result.adapters[layer.a][0].double()
        np.testing.assert_allclose(found, u[:, :RANK] * s[:RANK] @ vh[:RANK], atol=1e-5)
        cut, whole = cut + (s[RANK:] ** 2).sum(), whole + (s**2).sum()
    assert result.metrics["cut_energy"] == pytest.approx(cut / whole, abs=1e-6)
    assert distance(updates, result, p) == pytest.approx(cut**0.5, abs=1e-4)
    assert distance(updates, result, p) <= distance(updates, FedAvg().aggregate(updates, 0), p) + 1e-5


def test_fedsvd_has_orthonormal_rows() -> None:
    updates = round_of(FedSVD())
    result = FedSVD().aggregate(updates, 0)
    for layer in LAYERS:
        a = result.adapters[layer.a][0]
        torch.testing.assert_close(a @ a.T, torch.eye(RANK), rtol=0, atol=1e-5)
        b = result.adapters[layer.b][0]
        torch.testing.assert_close(b.T @ b, torch.diag(b.square().sum(0)), rtol=0, atol=1e-4)
    assert set(result.resets) == {name for layer in LAYERS for name in (layer.a, layer.b)}


@pytest.mark.parametrize("seed", range(5))
def test_lora_fair_is_never_further_from_the_exact_update_than_the_means(seed: int) -> None:
    updates = round_of(LoRAFAIR(), num_clients=4, seed=seed)
    p = weights_of(LoRAFAIR(), updates)
    means = distance(updates, FedAvg().aggregate(updates, 0), p)
    found = [distance(updates, LoRAFAIR(strength=s).aggregate(updates, 0), p) for s in (1e-9, 0.01, 1.0, 1e9)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(means, rel=1e-5)
    assert found[1] < means


def test_rotating_leaves_each_clients_product_unchanged_and_strength_0_is_the_mean() -> None:
    """One client alone has its product afterwards; strength 0 is FedAvg."""
    for round_index in (0, 1):
        alone = round_of(FedRotLoRA(), round_index, num_clients=1)
        result = FedRotLoRA().aggregate(alone, round_index)
        assert distance(alone, result, torch.ones(1).double()) < 1e-5
        assert not torch.allclose(result.adapters[LAYERS[0].a], alone.end[LAYERS[0].a])
        updates = round_of(FedRotLoRA(), round_index)
        expected = FedAvg().aggregate(updates, round_index).adapters
        result = FedRotLoRA(strength=0.0).aggregate(updates, round_index)
        assert result.resets == ()
        for name in expected:
            torch.testing.assert_close(result.adapters[name], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("round_index", [0, 1])
def test_rotated_copies_of_one_pair_are_brought_together(round_index: int) -> None:
    """Clients hold ``Rᵀ A`` and ``B R`` of the received A and B: their mean is that pair, and FedAvg's is not."""
    updates = round_of(FedRotLoRA(), round_index, num_clients=4)
    angles = torch.tensor([0.3, 1.0, 2.0, -2.5])
    turns = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=1).reshape(4, 2, 2)
    end = dict(updates.end)
    for layer in LAYERS:
        end[layer.a] = turns.transpose(1, 2) @ updates.start[layer.a]
        end[layer.b] = updates.start[layer.b] @ turns
    turned = replace(updates, end=end)
    result = FedRotLoRA(strength=1.0).aggregate(turned, round_index)
    for layer in LAYERS:
        for name in (layer.a, layer.b):
            torch.testing.assert_close(result.adapters[name], updates.start[name], rtol=0, atol=1e-5)
    p = weights_of(FedRotLoRA(), turned)
    assert distance(turned, FedAvg().aggregate(turned, 0), p) > 0.1


def test_nothing_is_rotated_in_the_first_round() -> None:
    """B is 0 where clients start: its product with anything says nothing of a rotation."""
    updates = round_of(FedRotLoRA(), adapter=initial_adapter(zero_b=True))
    result = FedRotLoRA().aggregate(updates, 0)
    expected = FedAvg().aggregate(updates, 0).adapters
    assert result.resets == ()
    for name in expected:
        torch.testing.assert_close(result.adapters[name], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", LORA)
def test_permuting_clients_and_inputs_unchanged(name: str) -> None:
    for round_index in (0, 1):
        rule = rule_of(name)
        updates = round_of(rule, round_index, num_clients=4)
        before = {n: t.clone() for n, t in updates.end.items()}
        order = [2, 0, 3, 1]
        permuted = replace(
            updates,
            clients=tuple(updates.clients[n] for n in order),
            start={n: t[order] for n, t in updates.start.items()},
            end={n: t[order] for n, t in updates.end.items()},
            losses=updates.losses[order],
            num_samples=updates.num_samples[order],
        )
        result, other = rule.aggregate(updates, round_index), rule_of(name).aggregate(permuted, round_index)
        first, second = (effective(updates, found, base_weights()) for found in (result, other))
        for weight in first:
            torch.testing.assert_close(first[weight], second[weight], rtol=0, atol=1e-5)
        assert set(result.adapters) >= set(updates.end)
        for n, tensor in updates.end.items():
            assert torch.equal(tensor, before[n])


@pytest.mark.parametrize("name", ["FFALoRA", "RoLoRA", "FedSALoRA", "FedRotLoRA"])
def test_different_starts_are_refused_by_name(name: str) -> None:
    rule = rule_of(name)
    updates = round_of(rule)
    updates.start["norm"][1] += 1
    with pytest.raises(TrainingError, match=rf"aggregation {rule.name} needs clients that start a round with the same"):
        rule.aggregate(updates, 0)


@pytest.mark.parametrize("name", LORA)
def test_all_samples_zero_is_refused(name: str) -> None:
    rule = rule_of(name, weights="samples")
    updates = round_of(rule)
    with pytest.raises(TrainingError, match=f"aggregation {rule.name}: num_samples is"):
        rule.aggregate(replace(updates, num_samples=torch.zeros(3)), 0)


def with_ranks(updates: Updates, ranks: list[int]) -> Updates:
    """The same clients with smaller ranks: what is beyond is 0."""

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        found = tensor.clone()
        for client, rank in enumerate(ranks):
            if "lora_A" in name:
                found[client, rank:] = 0
            elif "lora_B" in name:
                found[client, :, rank:] = 0
        return found

    start, end = ({n: cut(n, t) for n, t in stack.items()} for stack in (updates.start, updates.end))
    return replace(updates, start=start, end=end, ranks=torch.tensor(ranks))


def test_flora_and_flexlora_with_different_ranks() -> None:
    """FLoRA is exact with any ranks; FlexLoRA where the sum of ranks is at most the rank of the server."""
    for rule, ranks in ((FLoRA(), [1, 2, 2]), (FlexLoRA(), [1, 1])):
        updates = with_ranks(round_of(rule, num_clients=len(ranks)), ranks)
        assert distance(updates, rule.aggregate(updates, 0), weights_of(rule, updates)) < 1e-4


@pytest.mark.parametrize("weights", ["norms", "samples", "equal"])
@pytest.mark.parametrize("rule", [HetLoRA, RBLA])
def test_means_of_ranks_are_those_of_a_loop(rule: Any, weights: str) -> None:
    """Row after row in NumPy: zeros of clients without the row count in HetLoRA, and do not in RBLA."""
    ranks = [1, 2, 2, 1]
    updates = with_ranks(round_of(rule(), num_clients=4), ranks)
    a, b = ([updates.end[getattr(x, half)].double().numpy() for x in LAYERS] for half in "ab")
    norms = np.sqrt(sum((x.scale * np.linalg.norm(b[i] @ a[i], axis=(1, 2))) ** 2 for i, x in enumerate(LAYERS)))
    omega = {"norms": norms, "samples": updates.num_samples.numpy(), "equal": np.ones(4)}[weights]
    omega = omega / omega.sum()
    result = rule(weights=weights).aggregate(updates, 0)
    np.testing.assert_allclose(result.per_client["update_weight"], omega, rtol=1e-6)
    for i, layer in enumerate(LAYERS):
        for row in range(RANK):
            have = [n for n in range(4) if ranks[n] > row]
            total = sum(omega[n] for n in have) if rule is RBLA else 1.0
            expected_a = sum(omega[n] * a[i][n][row] for n in have) / total
            expected_b = sum(omega[n] * b[i][n][:, row] for n in have) / total
            np.testing.assert_allclose(result.adapters[layer.a][0][row], expected_a, atol=1e-6)
            np.testing.assert_allclose(result.adapters[layer.b][0][:, row], expected_b, atol=1e-6)


@pytest.mark.parametrize("rule", [HetLoRA(), RBLA()])
def test_rows_that_no_client_of_the_round_has_stay(rule: Any) -> None:
    updates = with_ranks(round_of(rule), [1, 1, 1])
    result = rule.aggregate(updates, 0)
    for layer in LAYERS:
        torch.testing.assert_close(result.adapters[layer.a][0][1], updates.model[layer.a][1])
        torch.testing.assert_close(result.adapters[layer.b][0][:, 1], updates.model[layer.b][:, 1])
        assert not torch.allclose(result.adapters[layer.a][0][0], updates.model[layer.a][0])


def test_hetlora_with_one_rank_and_samples_is_fedavg() -> None:
    updates = round_of(HetLoRA())
    expected = FedAvg().aggregate(updates, 0).adapters
    for rule in (HetLoRA(weights="samples"), RBLA()):
        for name, tensor in rule.aggregate(updates, 0).adapters.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
