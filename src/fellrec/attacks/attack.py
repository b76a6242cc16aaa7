"""What an attack on the cut is: guesses from what the server sees and what is public.

Shape letters: B rows, L tokens, D hidden size, K guesses, T targets.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fellrec.attacks.observe import Observed

_SCORES_TOGETHER = 1 << 26
"""Scores of tokens that are in memory at once."""


class TokenAttack(Protocol):
    """Guesses tokens from hidden states of the first cut. Made from `Public`, once for each depth."""

    def tokens(self, hidden_BLD: Tensor, num: int) -> Tensor:
        """The likeliest tokens ``[B, L, K]`` int64 at each position, the likeliest first."""


class TargetAttack(Protocol):
    """Guesses what a client's batch predicts. Made from `Public`, once for each depth."""

    def targets(self, observed: Observed, num: int) -> Tensor:
        """The likeliest targets ``[T, K]`` int64 of the batch, the likeliest first."""


def best_rows(queries_ND: Tensor, table_VD: Tensor, num: int) -> Tensor:
    """The rows of a table with the largest inner products with each query, ``[N, K]`` int64, in chunks.

    Args:
        queries_ND: ``[N, D]``.
        table_VD: ``[V, D]``.
        num: K, at most V.
    """
    together = max(1, _SCORES_TOGETHER // len(table_VD))
    return torch.cat([(some @ table_VD.T).topk(num, dim=1).indices for some in queries_ND.split(together)])
