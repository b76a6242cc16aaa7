"""Coordinate-wise median and trimmed mean (Yin et al., ICML 2018)."""

from __future__ import annotations

from functools import partial

from fellrec.aggregation.robust import RobustRule
from fellrec.aggregation.settings.robust import CoordinateMedianSettings, TrimmedMeanSettings
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.robust import entrywise_median, trimmed_mean


class CoordinateMedian(RobustRule, CoordinateMedianSettings):
    """The median of each entry of the updates; of an even number, the mean of the two in the middle."""

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move the shared model by it."""
        return self.move_entrywise(updates, self.rows(updates, round_index).matrix, entrywise_median)


class TrimmedMean(RobustRule, TrimmedMeanSettings):
    """The plain mean of each entry of the updates without its f lowest and f highest."""

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move the shared model by it."""
        drop = partial(trimmed_mean, count=self.byzantine)
        return self.move_entrywise(updates, self.rows(updates, round_index).matrix, drop)
