"""Persistence-weighted mixing: the more a client's updates agree over rounds, the more it keeps of its own adapter.

See docs/persistence.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.mixing import PersistenceSettings
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional import mixing
from fellrec.functional.sketch import sketch_updates


class Persistence(AggregationCallback, PersistenceSettings):
    """An average for what is noise, each client's own adapter for what is lasting.

    A client's deviation is its update minus the average that it would get. Where it points the same way as the client's
    deviation of its round before, it is no noise of mini-batches: it comes from the client's data. With ``q[c, n]``
    the average's weights, whose rows sum to 1:

    - (P1) ``d[c] = update[c] - sum over n of q[c, n] update[n]``
    - (P2) ``w[c] = max(0, cos(d[c], d[c] of c's last round)) ** exponent``, and 0 in a client's first round
    - (P3) ``W[c, n] = (1 - w[c]) q[c, n]`` for ``n != c``, and ``W[c, c] = (1 - w[c]) q[c, c] + w[c]``

    Updates are kept and compared as count sketches, 16 kB a client, so cosines are exact to about 0.02.
    """

    def __post_init__(self) -> None:
        """Start without a memory."""
        super().__post_init__()
        self._deviations: dict[int, Tensor] = {}

    def mixing_matrix(self, updates: Updates, round_index: int) -> Tensor:
        """(P3), ``[N, N]`` float64; nothing is remembered."""
        return self._terms(updates)[0]

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Mix, report ``mixing`` and ``self_weight``, and remember the deviations."""
        matrix, weights, deviations = self._terms(updates)
        self._deviations |= dict(zip(updates.clients, deviations.float(), strict=True))
        return self.combine(updates, matrix, per_client={"self_weight": weights})

    def state_dict(self) -> dict[str, Any]:
        """The sketches of the clients' last deviations."""
        return {str(client): deviation for client, deviation in self._deviations.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._deviations = {int(client): deviation for client, deviation in state.items()}

    def _terms(self, updates: Updates) -> tuple[Tensor, Tensor, Tensor]:
        """(P3) ``[N, N]``, (P2) ``[N]`` and (P1), sketched, ``[N, buckets]``, all float64."""
        sketches = sketch_updates(updates.end, updates.start)
        average = self._average(updates, sketches)
        deviations = sketches - average @ sketches
        weights = self._self_weights(updates.clients, deviations)
        return (1 - weights)[:, None] * average + torch.diag(weights), weights, deviations

    def _average(self, updates: Updates, sketches: Tensor) -> Tensor:
        """q, ``[N, N]``."""
        count = len(updates.clients)
        if self.others == "samples":
            return self.sample_shares(updates).expand(count, -1)
        if self.others == "equal":
            return torch.full((count, count), 1 / count, dtype=torch.float64)
        return mixing.mixing_matrix(mixing.similarity(sketches @ sketches.T), torch.ones(count, dtype=torch.float64))

    def _self_weights(self, clients: Sequence[int], deviations: Tensor) -> Tensor:
        """(P2), ``[N]``."""
        unknown = torch.zeros(deviations.shape[1])
        before = torch.stack([self._deviations.get(client, unknown) for client in clients]).double()
        # A deviation that is rounding alone has no direction.
        noise = 1e-9 * deviations.norm(dim=1).max()
        cosine = F.cosine_similarity(deviations, before, dim=1) * (deviations.norm(dim=1) > noise)
        return cosine.clamp(0, 1) ** self.exponent
