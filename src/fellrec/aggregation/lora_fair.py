"""LoRA-FAIR (Bian et al., ICCV 2025), with a squared distance, for which the correction has a closed form."""

from __future__ import annotations

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.factors import factors
from fellrec.aggregation.settings.lora import LoRAFAIRSettings
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.lora import correction, mean


class LoRAFAIR(AggregationCallback, LoRAFAIRSettings):
    """``A' = Ā`` and ``B' = B̄ + D``, where D makes ``B' Ā`` nearer to ``Σ p_k B_k A_k``; see ``correction``.

    The paper minimises ``1 − cosine`` by gradient steps at the server; here it is the squared Frobenius distance.
    """

    population = SharedModel

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Means, and B's correction."""
        weights = self.client_weights(updates, self.weights)
        adapter = updates.weighted_sums(weights)
        for layer, a, b in factors(updates):
            adapter[layer.b] = mean(b, weights) + correction(a, b, weights, self.strength)
        return self.shared(updates, adapter)
