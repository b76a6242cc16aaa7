"""FedAvgM (Hsu et al., 2019): a momentum at the server."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.averages import FedAvgMSettings
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Aggregated, Updates


class FedAvgM(AggregationCallback, FedAvgMSettings):
    """With the mean update Δ: ``u ← β u + Δ``, ``w ← w + η_s u``; u is Δ in the first round."""

    population = SharedModel

    def __post_init__(self) -> None:
        """Start without a momentum."""
        super().__post_init__()
        self._momentum: dict[str, Tensor] = {}

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move the shared model by the momentum, which is kept in float64."""
        start, mean = updates.mean_update(self.name, self.client_weights(updates, self.weights))
        for name, change in mean.items():
            self._momentum[name] = self.momentum * self._momentum[name] + change if name in self._momentum else change
        return self.shared(updates, {n: start[n] + self.server_learning_rate * self._momentum[n] for n in mean})

    def state_dict(self) -> dict[str, Any]:
        """The momentum by parameter."""
        return dict(self._momentum)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._momentum = dict(state)
