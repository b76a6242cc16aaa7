"""FedBuff (Nguyen et al., AISTATS 2022)."""

from __future__ import annotations

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.asynchronous import FedBuffSettings
from fellrec.federated.populations import ModelVersions
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.staleness import polynomial

_BUFFER = 10
"""The paper's K."""


class FedBuff(AggregationCallback, FedBuffSettings):
    """The server's model moves by the mean of K updates, in which those from old versions count less.

    The mean divides by the number of updates, not by the sum of their weights: a buffer of stale updates makes a
    smaller step.
    """

    population = ModelVersions

    def buffer_of(self, num_training: int) -> int | None:
        """K."""
        return min(_BUFFER, num_training) if self.buffer_size is None else self.buffer_size

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move the server's model by the updates, each times ``η_s s(d_k) / K``."""
        scale = polynomial(updates.staleness(round_index), self.exponent)
        weights = self.server_learning_rate * scale / len(updates.clients)
        return self.move(updates, weights, model=updates.model or None)
