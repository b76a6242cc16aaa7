"""FlexLoRA (Bai et al., NeurIPS 2024) and FedSVD (Lee et al., NeurIPS 2025): products are decomposed at the server."""

from __future__ import annotations

from dataclasses import replace

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.factors import factors
from fellrec.aggregation.settings.lora import FedSVDSettings, FlexLoRASettings
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.lora import is_factor, stacked, truncated


class FlexLoRA(AggregationCallback, FlexLoRASettings):
    """``Σ p_k B_k A_k = U Σ Vᵀ``, of which every client gets ``B = U Σ`` and ``A = Vᵀ`` up to the rank.

    All layers of a run have one scale α / r, which cancels. The metric ``cut_energy`` is the share of squared singular
    values, over all layers, that the rank cuts off.
    """

    population = SharedModel

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Decompose the mean of products; other parameters are averaged."""
        weights = self.client_weights(updates, self.weights)
        adapter = updates.weighted_sums(weights)
        cut = energy = 0.0
        resets = []
        for layer, a, b in factors(updates):
            rank = a.shape[1]
            adapter[layer.a], adapter[layer.b], values = truncated(*stacked(a, b, weights), rank)
            squares = (layer.scale * values).square()
            cut, energy = cut + float(squares[rank:].sum()), energy + float(squares.sum())
            resets += [layer.a, layer.b]
            if not values.any():  # no direction is better than another: keep A
                adapter[layer.a] = updates.model[layer.a]
        metrics = {"cut_energy": cut / energy if energy else 0.0}
        return replace(self.shared(updates, adapter, metrics=metrics), resets=tuple(resets))


class FedSVD(AggregationCallback, FedSVDSettings):
    """B is trained and averaged; then ``B̄ A = U Σ Vᵀ`` gives ``A = Vᵀ`` and ``B = U Σ`` of the same rank.

    Nothing is cut off. Where B̄ is 0 both factors stay.
    """

    population = SharedModel

    def trains(self, name: str, round_index: int) -> bool:
        """Everything but A."""
        return not is_factor(name, "A")

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Average, then decompose."""
        adapter = updates.weighted_sums(self.client_weights(updates, self.weights))
        resets = []
        for layer in updates.layers:
            b, a = adapter[layer.b].double(), updates.model[layer.a]
            adapter[layer.a] = a
            if b.any():
                new_a, adapter[layer.b], _ = truncated(b, a.double(), len(a))
                adapter[layer.a] = new_a.to(a.dtype)
                resets += [layer.a, layer.b]
        return replace(self.shared(updates, adapter), resets=tuple(resets))
