"""FedALT (Bian et al., AAAI 2026): each client trains its own LoRA beside a frozen one, the mean of the others'."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.personalised import FedALTSettings
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.mixing import Mixture
from fellrec.functional.names import OWN, REST, last_part
from fellrec.functional.stacks import Renamed


class FedALT(AggregationCallback, FedALTSettings):
    """Clients keep their own factors and router; of the others they receive the means of A and B, ``1 / (N − 1)`` each.

    The means are over the other clients of the round's cohort. A client that is alone, or absent, keeps what it
    received before.
    """

    keeps_trained = True
    waived_laws = MappingProxyType(
        {
            "no_movement": "clients receive the others' adapters beside their own, even if no adapter has changed",
            "fixed_point": "clients receive what others trained beside their own",
        }
    )

    def trains(self, name: str, round_index: int) -> bool:
        """Everything but the others' factors."""
        return not last_part(name).startswith(REST)

    def exchanges(self, name: str, round_index: int) -> bool:
        """The client's own factors."""
        return last_part(name).startswith(OWN)

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """The mean of the others' own factors as the next frozen ones of each client."""
        num_clients = len(updates.clients)
        if num_clients == 1:
            return Aggregated({})
        matrix = others(num_clients)
        rest = Renamed(Mixture(matrix, updates.end), lambda name: name.replace(f".{OWN}", f".{REST}"))
        return self.combine(updates, matrix, adapters=rest)


def others(num_clients: int) -> Tensor:
    """The mixing matrix with zeros on the diagonal and ``1 / (N − 1)`` elsewhere, ``[N, N]`` float64.

    Example:
        >>> others(3).tolist()
        [[0.0, 0.5, 0.5], [0.5, 0.0, 0.5], [0.5, 0.5, 0.0]]
    """
    return (1 - torch.eye(num_clients, dtype=torch.float64)) / (num_clients - 1)
