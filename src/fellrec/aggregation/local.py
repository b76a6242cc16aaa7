"""No aggregation: what clients reach alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.averages import LocalSettings
from fellrec.federated.records import Updates


class Local(AggregationCallback, LocalSettings):
    """Each client keeps its own adapter; the baseline for every client's gain."""

    def mixing_matrix(self, updates: Updates, round_index: int) -> Tensor:
        """The identity, ``[N, N]`` float64."""
        return torch.eye(len(updates.clients), dtype=torch.float64)
