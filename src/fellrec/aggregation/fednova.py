"""FedNova (Wang et al., NeurIPS 2020): updates of clients with different numbers of local steps."""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.averages import FedNovaSettings
from fellrec.errors import TrainingError
from fellrec.federated.records import Updates


class FedNova(AggregationCallback, FedNovaSettings):
    """``w + τ Σ p_k Δ_k / K_k`` with ``τ = Σ p_k K_k``, K_k the client's local steps.

    K_k is the paper's normaliser for SGD with one learning rate; with AdamW it is a substitution.
    """

    def update_weights(self, updates: Updates, round_index: int) -> Tensor:
        """``τ p_k / K_k``, ``[N]`` float64; 0 for a client that took no step.

        Raises:
            TrainingError: If the numbers of steps are unknown.
        """
        if updates.num_steps is None:
            raise TrainingError(f"aggregation {self.name} needs the clients' numbers of local steps")
        shares, steps = self.client_weights(updates, self.weights), updates.num_steps.double()
        return torch.where(steps > 0, (shares * steps).sum() * shares / steps.clamp_min(1), 0.0)
