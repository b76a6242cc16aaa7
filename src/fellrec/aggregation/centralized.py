"""The upper reference: all interactions in one place."""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.averages import CentralizedSettings
from fellrec.federated.populations import OneForAll
from fellrec.federated.records import Updates


class Centralized(AggregationCallback, CentralizedSettings):
    """The loop trains one client that holds the data of all clients, and serves every client with its adapter.

    Not federated: it shows what could be reached if interactions could leave the clients.
    """

    population = OneForAll

    def mixing_matrix(self, updates: Updates, round_index: int) -> Tensor:
        """The identity, ``[N, N]`` float64: there is nothing to mix."""
        return torch.eye(len(updates.clients), dtype=torch.float64)
