"""Mixing what clients learned, not what they are (docs/updatemixing.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.checks import check_flag, check_number
from fellrec.functional import mixing
from fellrec.types import Aggregated, Updates


class UpdateMixing(AggregationCallback):
    """Each client goes on from its own adapter, by what similar clients and it itself learned in this round.

    With ``update[n] = end[n] - start[n]``, S the similarities of METHOD (1) between the updates, o the own share and η
    the server's learning rate:

    - (U1) ``A[c, n] = S[c, n] / (sum over m of S[c, m])``, or ``1 / N`` without attention
    - (U2) ``W[c, n] = (1 - o) A[c, n]`` for ``n != c``, and ``W[c, c] = (1 - o) A[c, c] + o``
    - (U3) ``adapter[c] = start[c] + η (sum over n of W[c, n] update[n])``

    Rules that mix adapters draw clients together in every round; here what sets a client apart from the others stays.
    What others learn in a round in which a client is absent never reaches it.
    """

    def __init__(self, own_share: float = 0.0, server_learning_rate: float = 1.0, *, attention: bool = True) -> None:
        """Set the hyper-parameters.

        Args:
            own_share: o of (U2), from 0 to 1; 1 is `Local`.
            server_learning_rate: η of (U3), positive.
            attention: Whether similarities weigh the senders, (U1).

        Raises:
            ConfigError: If a value is not allowed.
        """
        self.own_share = check_number("own_share", own_share, minimum=0, maximum=1)
        self.server_learning_rate = check_number("server_learning_rate", server_learning_rate, above=0)
        self.attention = check_flag("attention", attention)

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
        everybody = torch.ones(len(similarity), dtype=torch.float64)
        average = mixing.mixing_matrix(similarity if self.attention else torch.ones_like(similarity), everybody)
        return (1 - self.own_share) * average + self.own_share * torch.diag(everybody)
