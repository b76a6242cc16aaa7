"""Bulyan (El Mhamdi et al., ICML 2018)."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from fellrec.aggregation.robust import RobustRule
from fellrec.aggregation.settings.robust import BulyanSettings
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.robust import bulyan_selection, mean_near_median


class Bulyan(RobustRule, BulyanSettings):
    """N − 2f updates by Krum, one after the other; of these, each entry's mean of the N − 4f nearest to the median."""

    times: ClassVar[int] = 4
    more: ClassVar[int] = 3

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move the shared model by it."""
        rows = self.rows(updates, round_index)
        chosen = bulyan_selection(rows.gram, self.byzantine)
        near = partial(mean_near_median, count=len(chosen) - 2 * self.byzantine)
        return self.move_entrywise(updates, rows.matrix[chosen], near)
