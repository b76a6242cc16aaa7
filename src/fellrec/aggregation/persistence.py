"""Persistence-weighted mixing: a client keeps of its own what it keeps saying (docs/persistence.md)."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.checks import check_number
from fellrec.functional.sketch import sketch_updates
from fellrec.types import Aggregated, Updates


class Persistence(AggregationCallback):
    """FedAvg for what is noise, each client's own adapter for what is lasting.

    A client's deviation is its update minus the weighted mean of all updates. Where it points the same way as the
    client's deviation of its round before, it is no noise of mini-batches: it comes from the client's data. With
    ``p[n]`` FedAvg's weights:

    - (P1) ``d[c] = update[c] - sum over n of p[n] update[n]``
    - (P2) ``w[c] = max(0, cos(d[c], d[c] of c's last round)) ** exponent``, and 0 in a client's first round
    - (P3) ``W[c, n] = (1 - w[c]) p[n]`` for ``n != c``, and ``W[c, c] = (1 - w[c]) p[c] + w[c]``

    Deviations are kept as count sketches, 16 kB a client, so (P2) is exact to about 0.02.
    """

    def __init__(self, exponent: float = 0.5) -> None:
        """Set the hyper-parameter.

        Args:
            exponent: Of (P2), positive; the smaller, the more a client keeps.

        Raises:
            ConfigError: If the value is not allowed.
        """
        self.exponent = check_number("exponent", exponent, above=0)
        self._deviations: dict[int, Tensor] = {}

    def mixing_matrix(self, updates: Updates, round_index: int) -> Tensor:
        """(P3), ``[N, N]`` float64; nothing is remembered."""
        return self._matrix(updates, self._self_weights(updates, self._deviations_of(updates)))

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Mix, report ``mixing`` and ``self_weight``, and remember the deviations."""
        deviations = self._deviations_of(updates)
        weights = self._self_weights(updates, deviations)
        self._deviations |= dict(zip(updates.clients, deviations.float(), strict=True))
        return self.combine(updates, self._matrix(updates, weights), per_client={"self_weight": weights})

    def state_dict(self) -> dict[str, Any]:
        """The sketches of the clients' last deviations."""
        return {str(client): _pack(deviation) for client, deviation in self._deviations.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self._deviations = {int(client): _unpack(text) for client, text in state.items()}

    def _deviations_of(self, updates: Updates) -> Tensor:
        """(P1), sketched, ``[N, buckets]``."""
        sketches = sketch_updates(updates.end, updates.start)
        return sketches - self.sample_shares(updates) @ sketches

    def _self_weights(self, updates: Updates, deviations: Tensor) -> Tensor:
        """(P2), ``[N]`` float64."""
        unknown = torch.zeros(deviations.shape[1])
        before = torch.stack([self._deviations.get(client, unknown) for client in updates.clients]).double()
        # A deviation that is rounding alone has no direction.
        noise = 1e-9 * deviations.norm(dim=1).max()
        cosine = F.cosine_similarity(deviations, before, dim=1) * (deviations.norm(dim=1) > noise)
        return cosine.clamp(0, 1) ** self.exponent

    def _matrix(self, updates: Updates, weights: Tensor) -> Tensor:
        """(P3)."""
        shared = (1 - weights)[:, None] * self.sample_shares(updates)
        return shared + torch.diag(weights)


def _pack(sketch: Tensor) -> str:
    return base64.b64encode(sketch.float().numpy().tobytes()).decode()


def _unpack(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.float32).copy())
