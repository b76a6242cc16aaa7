"""Mixing of the clients' updates instead of their adapters (docs/updatemixing.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.mixing import UpdateMixingSettings
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional import mixing


class UpdateMixing(AggregationCallback, UpdateMixingSettings):
    """Each client continues from its own adapter, plus what it and similar clients learned in this round.

    With ``update[n] = end[n] - start[n]``, S the similarities of METHOD (1) between the updates, o the own share and η
    the server's learning rate:

    - (U1) ``A[c, n] = S[c, n] / (sum over m of S[c, m])``, or ``1 / N`` without attention
    - (U2) ``W[c, n] = (1 - o) A[c, n]`` for ``n != c``, and ``W[c, c] = (1 - o) A[c, c] + o``
    - (U3) ``adapter[c] = start[c] + η (sum over n of W[c, n] update[n])``

    Rules that mix adapters draw clients together in every round; here what sets a client apart from the others stays.
    What others learn in a round in which a client is absent never reaches it.
    """

    def __post_init__(self) -> None:
        """Declare which laws cannot hold."""
        super().__post_init__()
        self.waived_laws = {"equal_ends": "updates are mixed, not adapters"}
        if self.server_learning_rate != 1:
            self.waived_laws["fixed_point"] = f"server_learning_rate={self.server_learning_rate:g} scales all updates"

    def mixing_matrix(self, updates: Updates, round_index: int) -> Tensor:
        """(U2), ``[N, N]`` float64: how updates are mixed."""
        return self._matrix(self._similarity(updates))

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move every client by (U3), and report ``mixing`` and ``similarity``."""
        similarity = self._similarity(updates)
        matrix = self._matrix(similarity)
        moved = mixing.Mixture(self.server_learning_rate * matrix, updates.end, updates.start)
        return self.combine(updates, matrix, matrices={"similarity": similarity}, adapters=moved)

    @staticmethod
    def _similarity(updates: Updates) -> Tensor:
        """METHOD (1) between the updates, ``[N, N]`` float64."""
        return mixing.similarity(mixing.gram_matrix(updates.end, updates.start))

    def _matrix(self, similarity: Tensor) -> Tensor:
        """(U2), ``[N, N]`` float64."""
        ones = torch.ones(len(similarity), dtype=torch.float64)
        average = mixing.mixing_matrix(similarity if self.attention else torch.ones_like(similarity), ones)
        return (1 - self.own_share) * average + self.own_share * torch.diag(ones)
