"""The plain average."""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.averages import UniformSettings
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Updates


class Uniform(AggregationCallback, UniformSettings):
    """Every client gets the unweighted mean; FELLRec with both halves switched off."""

    population = SharedModel

    def mixing_matrix(self, updates: Updates, round_index: int) -> Tensor:
        """``1 / N`` everywhere, ``[N, N]`` float64."""
        num_clients = len(updates.clients)
        return torch.full((num_clients, num_clients), 1 / num_clients, dtype=torch.float64)
