"""FedAsync (Xie et al., OPT 2020)."""

from __future__ import annotations

from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.fedprox import Proximal
from fellrec.aggregation.settings.asynchronous import FedAsyncSettings
from fellrec.federated.populations import ModelVersions
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.staleness import constant, hinge, polynomial

_DECAYS = {"constant": 0.0, "polynomial": 0.5, "hinge": 10.0}
"""The paper's."""


class FedAsync(AggregationCallback, FedAsyncSettings):
    """The server's model moves towards each client's model as it arrives, less if that is made from an old version."""

    population = ModelVersions

    def __post_init__(self) -> None:
        """Make the local term."""
        super().__post_init__()
        self.local_terms = [Proximal(self.mu)]

    def buffer_of(self, num_training: int) -> int | None:
        """One update."""
        return 1

    def mixing_weights(self, staleness: Tensor) -> Tensor:
        """``α s(d)`` for each update, ``[N]`` float64."""
        decay = _DECAYS[self.staleness] if self.decay is None else self.decay
        if self.staleness == "constant":
            return self.alpha * constant(staleness)
        if self.staleness == "polynomial":
            return self.alpha * polynomial(staleness, decay)
        return self.alpha * hinge(staleness, decay, self.tolerance)

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """The server's model, moved towards that of the client; of several at the same time, by the mean movement."""
        model = updates.model or None
        if model is None:
            updates.check_common_start(self.name)
        mixing = self.mixing_weights(updates.staleness(round_index))
        return self.shared(updates, updates.mixed(mixing / len(mixing), model), {"mixing_weight": mixing})
