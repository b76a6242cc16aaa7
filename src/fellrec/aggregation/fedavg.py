"""FedAvg (McMahan et al., 2017)."""

from __future__ import annotations

from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.averages import FedAvgSettings
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Updates


class FedAvg(AggregationCallback, FedAvgSettings):
    """Every client gets the mean of all adapters, weighted by the number of training targets."""

    population = SharedModel

    def mixing_matrix(self, updates: Updates, round_index: int) -> Tensor:
        """``num_samples[n] / sum(num_samples)`` in each row, ``[N, N]`` float64.

        Raises:
            TrainingError: See ``sample_shares``.
        """
        shares = self.sample_shares(updates)
        return shares.expand(len(shares), -1).contiguous()
