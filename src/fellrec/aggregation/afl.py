"""Agnostic federated learning (Mohri et al., ICML 2019)."""

from __future__ import annotations

from typing import Any

import torch

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.fairness import AFLSettings
from fellrec.federated.populations import AveragedModel
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.fairness import project_to_simplex


class AFL(AggregationCallback, AFLSettings):
    """``w + η Σ λ_k Δ_k``, then λ ← the nearest point to ``λ + γ F`` in the simplex; the mean of all w is served.

    The paper's clients send gradients of one batch; here they send updates, as in other implementations. Clients that
    fail in a round keep their weight; those that finish share the rest.
    """

    population = AveragedModel
    needs_start_loss = True

    def __post_init__(self) -> None:
        """Start with equal weights."""
        super().__post_init__()
        self._weights: dict[str, float] = {}

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move the shared model with the weights of the round before, and change them by the losses."""
        equal = 1 / (updates.num_clients or len(updates.clients))
        weights = torch.tensor([self._weights.get(str(c), equal) for c in updates.clients], dtype=torch.float64)
        total = float(weights.sum())
        after = project_to_simplex(weights + self.gamma * self.received_losses(updates), total)
        scale = self.server_learning_rate / total if total > 0 else 0.0
        result = self.move(updates, scale * weights, {"lambda": after})
        self._weights |= {str(client): float(value) for client, value in zip(updates.clients, after)}
        return result

    def state_dict(self) -> dict[str, Any]:
        """The clients' weights."""
        return {"weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._weights = dict(state["weights"])
