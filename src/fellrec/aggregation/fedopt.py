"""FedAdagrad, FedAdam and FedYogi (Reddi et al., ICLR 2021): adaptive optimisers at the server."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.averages import FedAdagradSettings, FedAdamSettings, FedYogiSettings
from fellrec.aggregation.settings.base import Weights
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Aggregated, Updates


class ServerOptimizer(AggregationCallback):
    """What the three rules have in common, in float64, for the mean update Δ and the setting's η_s, β₁ and τ.

    ``m ← β₁ m + (1 − β₁) Δ``, then v, then ``w ← w + η_s m / (√v + τ)``. As in the paper there is no correction of the
    bias, and v starts at τ². Flower's rules of the same names start v at 0; its FedAdam corrects the bias.
    """

    population = SharedModel
    server_learning_rate: float
    beta1: float
    tau: float
    weights: Weights

    def __post_init__(self) -> None:
        """Start without moments."""
        super().__post_init__()  # type: ignore[misc]
        self._first: dict[str, Tensor] = {}
        self._second: dict[str, Tensor] = {}

    def second_moment(self, moment: Tensor, squared: Tensor) -> Tensor:
        """The next v, from the last one and Δ²."""
        raise NotImplementedError

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move the shared model by one step of the optimiser."""
        start, mean = updates.mean_update(self.name, self.client_weights(updates, self.weights))
        adapter = {}
        for name, change in mean.items():
            first = self._first.get(name, torch.zeros_like(change))
            second = self._second.get(name, torch.full_like(change, self.tau**2))
            self._first[name] = self.beta1 * first + (1 - self.beta1) * change
            self._second[name] = self.second_moment(second, change.square())
            step = self._first[name] / (self._second[name].sqrt() + self.tau)
            adapter[name] = start[name] + self.server_learning_rate * step
        return self.shared(updates, adapter)

    def state_dict(self) -> dict[str, Any]:
        """Both moments by parameter."""
        return {"first": self._first, "second": self._second}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._first, self._second = dict(state["first"]), dict(state["second"])


class FedAdagrad(ServerOptimizer, FedAdagradSettings):
    """Adagrad at the server."""

    def second_moment(self, moment: Tensor, squared: Tensor) -> Tensor:
        """``v + Δ²``."""
        return moment + squared


class FedAdam(ServerOptimizer, FedAdamSettings):
    """Adam at the server."""

    def second_moment(self, moment: Tensor, squared: Tensor) -> Tensor:
        """``β₂ v + (1 − β₂) Δ²``."""
        return self.beta2 * moment + (1 - self.beta2) * squared


class FedYogi(ServerOptimizer, FedYogiSettings):
    """Yogi at the server."""

    def second_moment(self, moment: Tensor, squared: Tensor) -> Tensor:
        """``v − (1 − β₂) Δ² sign(v − Δ²)``."""
        return moment - (1 - self.beta2) * squared * (moment - squared).sign()
