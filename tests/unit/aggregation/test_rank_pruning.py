"""HetLoRA's pruning of ranks: when a client is pruned, what it sends then, and what it trains from then on."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from lora_rounds import LAYERS, RANK, round_of
from torch import nn

from fellrec.aggregation import HetLoRA
from fellrec.aggregation.hetlora import TailPenalty
from fellrec.aggregation.toy import LAYERS as TOY_LAYERS
from fellrec.aggregation.toy import ToyClient, ToyFederation, random_adapter
from fellrec.errors import ConfigError, TrainingError
from fellrec.federated.population import Population
from fellrec.federated.records import Received, Updates
from fellrec.federated.terms import TermContext


def tails(stack: Any, row: int) -> float:
    """A client's product of the norms of its last row of A and column of B, over all layers."""
    a, b = ([stack[getattr(layer, half)][row].double().numpy() for layer in LAYERS] for half in "ab")
    return sum(float(np.linalg.norm(b_[:, 1:]) * np.linalg.norm(a_[1:])) for a_, b_ in zip(a, b, strict=True))


def with_tails(factors: tuple[float, ...]) -> Updates:
    """Clients of rank 2 whose last rows and columns are multiplied by a factor in training."""
    updates = round_of(HetLoRA(), num_clients=len(factors))
    for layer in LAYERS:
        for row, factor in enumerate(factors):
            updates.end[layer.a][row][1:] = factor * updates.start[layer.a][row][1:]
            updates.end[layer.b][row][:, 1:] = updates.start[layer.b][row][:, 1:]
    return updates


def test_clients_whose_last_rows_become_smaller_are_pruned_before_they_send() -> None:
    """The means are those of clients that had the smaller rank from the beginning."""
    updates = with_tails((0.9, 1.1, 0.5, 1.0))
    assert [tails(updates.end, row) < tails(updates.start, row) for row in range(4)] == [True, False, True, False]
    result = HetLoRA(prune_to=0.5).aggregate(updates, 0)
    assert result.ranks == {updates.clients[0]: 1, updates.clients[2]: 1}
    assert result.per_client["rank"].tolist() == [1, 2, 1, 2]
    end = {name: tensor.clone() for name, tensor in updates.end.items()}
    for layer in LAYERS:
        for row in (0, 2):
            end[layer.a][row][1:] = 0
            end[layer.b][row][:, 1:] = 0
    pruned = dataclasses.replace(updates, end=end, ranks=torch.tensor([1, 2, 1, 2]))
    expected = HetLoRA().aggregate(pruned, 0)
    assert not expected.ranks
    for name, tensor in expected.adapters.items():
        torch.testing.assert_close(result.adapters[name], tensor)


@pytest.mark.parametrize(("rank", "prune_to", "kept"), [(10, 0.9, 9), (8, 0.99, 7), (8, 0.5, 4), (1, 0.5, 1)])
def test_a_rank_is_rounded_down_and_stays_at_least_1(rank: int, prune_to: float, kept: int) -> None:
    a, b = torch.ones(1, rank, 3), torch.ones(1, 4, rank)
    layer = LAYERS[0]
    stacks = {"start": {layer.a: a, layer.b: b}, "end": {layer.a: a / 2, layer.b: b}}
    ones = torch.ones(1, dtype=torch.float64)
    updates = Updates((0,), **stacks, losses=ones, num_samples=ones, layers=(layer,))
    assert HetLoRA(prune_to=prune_to).next_ranks(updates).tolist() == [kept]


def test_the_penalty_has_the_gradient_of_its_formula() -> None:
    """d/dA of λ ‖B_t‖ ‖A_t‖ is λ ‖B_t‖ A_t / ‖A_t‖ in the tail, 0 elsewhere; at B = 0 all is 0."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"x.lora_A.default.weight": (4, 3), "x.lora_B.default.weight": (5, 4), "norm": (2,)}
    values = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    a, b, _ = values
    values[a][3:], values[b][:, 3:] = 0, 0  # rank 3: the tail with γ = 0.5 is row 1 and 2
    parameters = {name: nn.Parameter(value.clone()) for name, value in values.items()}
    term = TailPenalty(0.3, 0.5)
    loss = term.loss(parameters, TermContext(values))
    assert loss is not None
    loss.backward()
    tail_a, tail_b = values[a][1:3], values[b][:, 1:3]
    torch.testing.assert_close(loss.detach(), 0.3 * tail_a.norm() * tail_b.norm())
    expected = torch.zeros_like(values[a])
    expected[1:3] = 0.3 * tail_b.norm() * tail_a / tail_a.norm()
    torch.testing.assert_close(parameters[a].grad, expected)
    assert parameters["norm"].grad is None
    zero = {**parameters, b: nn.Parameter(torch.zeros_like(values[b]))}
    at_zero = term.loss(zero, TermContext(values))
    assert at_zero is not None
    parameters[a].grad = None
    at_zero.backward()
    assert not parameters[a].grad.any()
    assert not zero[b].grad.any()


def test_a_pruned_client_never_has_the_rows_again() -> None:
    """Also not by the momentum that they had: the data move the last rows to 0, where they get no gradient."""
    initial = random_adapter("initial", 0)
    target = {name: value.clone() for name, value in initial.items()}
    for layer in TOY_LAYERS:
        target[layer.a][1:], target[layer.b][:, 1:] = 0, 0
    rule = HetLoRA(prune_to=0.5, prune_strength=0.05)
    federation = ToyFederation(rule, [ToyClient(target, num_steps=3)] * 2, initial)
    assert federation.round(0).aggregated.ranks == {0: 1, 1: 1}
    for index in (1, 2):
        (first, _) = federation.trained(index)
        found = first.adapter.tensors()
        for layer in TOY_LAYERS:
            assert not found[layer.a][1:].any()
            assert not found[layer.b][:, 1:].any()
            assert found[layer.a][0].any()
        updates = federation.up([first])
        assert updates.ranks is not None
        assert updates.ranks.tolist() == [1]
        federation.finish(updates, index)


def test_ranks_need_a_rule_that_changes_them() -> None:
    with pytest.raises(TrainingError, match="the aggregation returned ranks: set changes_ranks"):
        Population({"a": torch.zeros(2)}, 1).receive(Received((0,), {}, ranks={0: RANK}))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"prune_to": 1.0}, r"aggregation.prune_to=1.0 is not allowed: a number in \(0, 1\), or null"),
        ({"prune_to": 0.9, "prune_strength": -1.0}, "aggregation.prune_strength=-1.0 is not allowed"),
        ({"prune_strength": 0.1}, "aggregation.prune_strength=0.1 needs aggregation.prune_to"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HetLoRA(**setting)
