"""Krum and Multi-Krum (Blanchard et al., NeurIPS 2017)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fellrec.aggregation.robust import RobustRule
from fellrec.aggregation.settings.robust import KrumSettings, MultiKrumSettings
from fellrec.functional.robust import krum_order, squared_distances


class Krum(RobustRule, KrumSettings):
    """The update with the least sum of squared distances to its N − f − 2 nearest; see `krum_order` for ties."""

    more: ClassVar[int] = 3

    def row_weights(self, gram: Tensor) -> Tensor:
        """1 for the update that is taken, 0 for the others."""
        return best_by_krum(gram, self.byzantine, 1)


class MultiKrum(RobustRule, MultiKrumSettings):
    """The plain mean of the m updates with the lowest scores of Krum."""

    more: ClassVar[int] = 3

    def least_rows(self) -> int:
        """As of Krum, and m + f."""
        return max(super().least_rows(), (self.num_selected or 0) + self.byzantine)

    def row_weights(self, gram: Tensor) -> Tensor:
        """``1 / m`` for the updates that are taken, 0 for the others."""
        count = self.num_selected or len(gram) - self.byzantine
        return best_by_krum(gram, self.byzantine, count) / count


def best_by_krum(gram: Tensor, byzantine: int, count: int) -> Tensor:
    """1 for the ``count`` rows with the best scores, 0 for the others, ``[R]``."""
    chosen = torch.zeros(len(gram), dtype=gram.dtype)
    chosen[krum_order(squared_distances(gram), byzantine)[:count]] = 1
    return chosen
