"""Base of rules whose shared parameters are a weighted mean over clients."""

from __future__ import annotations

from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.base import Weights
from fellrec.federated.records import Updates


class MeanRule(AggregationCallback):
    """The mean over clients, weighted by the setting ``weights``."""

    weights: Weights

    def update_weights(self, updates: Updates, round_index: int) -> Tensor:
        """The clients' weights in the mean, ``[N]`` float64."""
        return self.client_weights(updates, self.weights)
