"""The geometric median (Pillutla et al., IEEE TSP 2022)."""

from __future__ import annotations

from torch import Tensor

from fellrec.aggregation.robust import RobustRule
from fellrec.aggregation.settings.robust import GeometricMedianSettings
from fellrec.functional.robust import geometric_median_weights


class GeometricMedian(RobustRule, GeometricMedianSettings):
    """The point with the least sum of distances to the updates, by Weiszfeld's iteration from their mean."""

    def row_weights(self, gram: Tensor) -> Tensor:
        """Weights of the updates in the point, ``[R]`` with sum 1."""
        return geometric_median_weights(gram, self.smoothing, self.num_steps)
