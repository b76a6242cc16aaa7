"""FLoRA (Wang et al., NeurIPS 2024) and FedEx-LoRA (Singhal et al., ACL 2025), which change the frozen base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.factors import factors
from fellrec.aggregation.settings.lora import FedExLoRASettings, FLoRASettings
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Aggregated, LoraLayer, Updates
from fellrec.functional.lora import averaging_error, initial_a, smaller, stacked


class FLoRA(AggregationCallback, FLoRASettings):
    """``W ← W + s Σ p_k B_k A_k``; then A is drawn again and B is 0.

    The weights p_k are on one of the stacked factors only. Other parameters, such as those of ``modules_to_save``, are
    averaged.
    """

    population = SharedModel

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Change the base, and begin a new adapter."""
        weights = self.client_weights(updates, self.weights)
        adapter, base = updates.weighted_sums(weights), dict[str, Tensor]()
        for layer, a, b in factors(updates):
            base |= base_change(layer, *stacked(a, b, weights))
            adapter[layer.a] = initial_a(a.shape[1:], self.seed, "flora", round_index, layer.a)
            adapter[layer.b] = torch.zeros(b.shape[1:])
        names = [name for layer in updates.layers for name in (layer.a, layer.b)]
        return replace(self.shared(updates, adapter), base=base, resets=tuple(names))


class FedExLoRA(AggregationCallback, FedExLoRASettings):
    """``A' = Ā``, ``B' = B̄`` and ``W ← W + s (Σ p_k B_k A_k − B̄ Ā)``.

    The change of the base has a rank of up to N·r; it is not truncated, as the result would not be exact.
    """

    population = SharedModel

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Means, and a change of the base."""
        weights = self.client_weights(updates, self.weights)
        base: dict[str, Tensor] = {}
        for layer, a, b in factors(updates):
            base |= base_change(layer, *averaging_error(a, b, weights))
        return replace(self.shared(updates, updates.weighted_sums(weights)), base=base)


def base_change(layer: LoraLayer, left: Tensor, right: Tensor) -> Mapping[str, Tensor]:
    """``scale * left @ right`` as a change of the layer's frozen weight, in float32 and with small factors.

    Args:
        layer: The layer.
        left: ``[out, R]``.
        right: ``[R, in]``.
    """
    left, right = smaller(layer.scale * left, right)
    return layer.base_change(left.float(), right.float())
