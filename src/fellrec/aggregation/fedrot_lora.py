"""FedRot-LoRA (Zhang et al., ICML 2026): factors are rotated before they are averaged."""

from __future__ import annotations

from dataclasses import replace

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.factors import factors
from fellrec.aggregation.settings.lora import FedRotLoRASettings
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.lora import mean, rotations


class FedRotLoRA(AggregationCallback, FedRotLoRASettings):
    """Means of ``Q_kᵀ A_k`` and ``B_k Q_k``, whose products are those of the clients.

    In odd rounds Q_k aligns A_k with the received A, in even rounds B_k with the received B. Where that is 0, as in the
    first round, nothing is rotated. The optimiser's moments belong to factors that are not rotated: they are forgotten.
    """

    population = SharedModel

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Rotate, then average."""
        updates.check_common_start(self.name)
        weights = self.client_weights(updates, self.weights)
        adapter, resets = updates.weighted_sums(weights), list[str]()
        for layer, a, b in factors(updates):
            if round_index % 2:
                correlations = a @ updates.start[layer.a].double().transpose(1, 2)
            else:
                correlations = b.transpose(1, 2) @ updates.start[layer.b].double()
            if self.strength == 0 or not correlations.any():
                continue
            turn = rotations(correlations, self.strength)
            adapter[layer.a] = mean(turn.transpose(1, 2) @ a, weights)
            adapter[layer.b] = mean(b @ turn, weights)
            resets += [layer.a, layer.b]
        return replace(self.shared(updates, adapter), resets=tuple(resets))
