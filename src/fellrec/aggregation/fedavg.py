"""FedAvg (McMahan et al., 2017)."""

from __future__ import annotations

from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.errors import TrainingError
from fellrec.types import Updates


class FedAvg(AggregationCallback):
    """Every client gets the mean of all adapters, weighted by the number of training targets."""

    def mixing_matrix(self, updates: Updates, round_index: int) -> Tensor:
        """``num_samples[n] / sum(num_samples)`` in each row, ``[N, N]`` float64.

        Raises:
            TrainingError: If a number of samples is negative, or all are 0.
        """
        samples = updates.num_samples.double()
        if (samples < 0).any() or samples.sum() <= 0:
            raise TrainingError(
                f"aggregation fedavg: num_samples is {samples.tolist()} for clients {list(updates.clients)}; "
                "needed are numbers of at least 0 that are not all 0"
            )
        return (samples / samples.sum()).expand(len(samples), -1).contiguous()
