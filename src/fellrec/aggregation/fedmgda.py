"""FedMGDA+ (Hu et al., IEEE TNSE 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.fairness import FedMGDASettings
from fellrec.federated.records import Updates
from fellrec.functional.fairness import least_norm_weights
from fellrec.functional.mixing import gram_matrix


class FedMGDA(AggregationCallback, FedMGDASettings):
    """``w + η_s Σ λ_k Δ_k / ‖Δ_k‖``, λ near the clients' shares so that the sum is shortest.

    With ε = 1 no client's update has a negative product with the step. An update of 0 has the direction 0: with ε = 1
    it takes all the weight, for the model is then as good as it can be for that client.
    """

    def update_weights(self, updates: Updates, round_index: int) -> Tensor:
        """``η_s λ_k / ‖Δ_k‖``, ``[N]``, by ``step_length`` times the mean length of updates."""
        gram = gram_matrix(updates.end, updates.start)
        norms = gram.diagonal().clamp_min(0).sqrt()
        inverse = torch.where(norms > 0, 1 / norms, 0)
        shares = self.client_weights(updates, self.weights)
        weights = least_norm_weights(inverse[:, None] * gram * inverse[None, :], shares, self.epsilon)
        unit = float(shares @ norms) if self.step_length == "mean_norm" else 1.0
        return self.server_learning_rate * unit * weights * inverse
