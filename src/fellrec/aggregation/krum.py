"""Krum and Multi-Krum (Blanchard et al., NeurIPS 2017)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fellrec.aggregation.robust import RobustRule
from fellrec.aggregation.settings.robust import KrumSettings, MultiKrumSettings
from fellrec.functional.robust import krum_scores, lowest, squared_distances


class Krum(RobustRule, KrumSettings):
    """The update with the least sum of squared distances to its N − f − 2 nearest; ties go to the lower client."""

    more: ClassVar[int] = 3

    def row_weights(self, gram: Tensor) -> Tensor:
        """1 for the update that is taken, 0 for the others."""
        return lowest(krum_scores(squared_distances(gram), self.byzantine), 1)


class MultiKrum(RobustRule, MultiKrumSettings):
    """The plain mean of the m updates with the lowest scores of Krum."""

    more: ClassVar[int] = 3

    def least_rows(self) -> int:
        """As of Krum, and m + f."""
        return max(super().least_rows(), (self.num_selected or 0) + self.byzantine)

    def row_weights(self, gram: Tensor) -> Tensor:
        """``1 / m`` for the updates that are taken, 0 for the others."""
        count = self.num_selected or len(gram) - self.byzantine
        return lowest(krum_scores(squared_distances(gram), self.byzantine), count) / count
