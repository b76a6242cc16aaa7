"""Rounds of clients with LoRA: rectangular layers stored as Linear and as Conv1D, scales other than 1, other parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fellrec.aggregation.hetlora import MeansOfRanks
from fellrec.federated.base_change import with_changes
from fellrec.federated.records import Aggregated, LoraLayer, Updates
from fellrec.state.tensor_store import StoredTensors

SIZES = {"x": (7, 5), "y": (4, 6)}
"""Layer → out, in; the weight of y is stored as ``[in, out]``."""
RANK = 2
LAYERS = tuple(
    LoraLayer(f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight", f"{name}.weight", scale, name == "y")
    for name, scale in (("x", 0.5), ("y", 3.0))
)
Tensors = dict[str, Tensor]


def initial_adapter(seed: int = 0, zero_b: bool = False) -> Tensors:
    """An adapter of both layers and of one more parameter."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {layer.a: (RANK, SIZES[layer.a[0]][1]) for layer in LAYERS}
    shapes |= {layer.b: (SIZES[layer.b[0]][0], RANK) for layer in LAYERS}
    found = {name: torch.randn(shape, generator=generator) for name, shape in [*shapes.items(), ("norm", (5,))]}
    return {name: tensor * (not (zero_b and "lora_B" in name)) for name, tensor in found.items()}


def round_of(
    rule: Any, round_index: int = 0, num_clients: int = 3, seed: int = 0, adapter: Tensors | None = None
) -> Updates:
    """What a rule sees of clients that start with one adapter and change what the rule lets them train."""
    generator = torch.Generator().manual_seed(1000 + seed)
    adapter = adapter or initial_adapter(seed)
    start = {name: t.expand(num_clients, *t.shape).clone() for name, t in adapter.items()}
    end = {name: t + 0.5 * torch.randn(t.shape, generator=generator) for name, t in start.items()}
    sent = [name for name in start if rule.trains(name, round_index) and rule.exchanges(name, round_index)]
    return Updates(
        clients=tuple(range(num_clients)),
        start={name: start[name] for name in sent},
        end={name: end[name] for name in sent},
        losses=torch.rand(num_clients, generator=generator, dtype=torch.float64),
        num_samples=torch.randint(1, 100, (num_clients,), generator=generator).double(),
        layers=LAYERS,
        model={name: adapter[name] for name in start if rule.exchanges(name, round_index)},
    )


def weights_of(rule: Any, updates: Updates) -> Tensor:
    """The clients' weights in the rule's means."""
    if isinstance(rule, MeansOfRanks):
        return rule.rank_weights(updates, rule.next_ranks(updates))
    given: Tensor = rule.client_weights(updates, rule.weights)
    return given


def products(updates: Updates, weights: Tensor) -> Tensors:
    """``s Σ p_k B_k A_k`` of every layer, ``[out, in]`` float64, from the clients' adapters after training."""
    ends = {**_model(updates), **updates.end}
    return {
        layer.weight: layer.scale
        * torch.einsum("n,nor,nri->oi", weights, ends[layer.b].double(), ends[layer.a].double())
        for layer in LAYERS
    }


def _model(updates: Updates) -> Tensors:
    """The server's model for each client."""
    return {name: t.expand(len(updates.clients), *t.shape) for name, t in updates.model.items()}


def effective(updates: Updates, result: Aggregated, weights: Mapping[str, Tensor]) -> Tensors:
    """Every layer's weight with the changed base and the first client's next adapter, ``[out, in]`` float64.

    A personal factor, which the rule never sees, is that of `initial_adapter`.
    """
    changed = with_changes(weights, [StoredTensors(result.base)] if result.base else [])
    personal = {name: t[None] for name, t in initial_adapter().items()}
    known = {**personal, **_model(updates), **updates.end, **result.adapters}
    adapter = {name: t[0].double() for name, t in known.items()}
    return {
        layer.weight: (changed[layer.weight].T if layer.is_transposed else changed[layer.weight])
        + layer.scale * adapter[layer.b] @ adapter[layer.a]
        for layer in LAYERS
    }


def base_weights(seed: int = 0) -> Tensors:
    """Frozen weights as they are stored, float64."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.weight: torch.randn(*reversed(SIZES[layer.a[0]]), generator=generator, dtype=torch.float64)
        if layer.is_transposed
        else torch.randn(*SIZES[layer.a[0]], generator=generator, dtype=torch.float64)
        for layer in LAYERS
    }


def plain(weights: Mapping[str, Tensor]) -> Tensors:
    """Frozen weights as ``[out, in]``."""
    return {layer.weight: weights[layer.weight].T if layer.is_transposed else weights[layer.weight] for layer in LAYERS}
