"""Clipping of updates, and of their differences from the last step (Karimireddy et al., ICML 2021)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fellrec.aggregation.robust import RobustRule
from fellrec.aggregation.settings.robust import CenteredClippingSettings, NormClippingSettings
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.mixing import gram_matrix
from fellrec.functional.robust import centered_clipping_weights, clip_factors, middle, squared_norms
from fellrec.functional.stacks import Appended, Combinations, Differences


class NormClipping(RobustRule, NormClippingSettings):
    """The plain mean of the updates, each shortened to the length c if it is longer."""

    def row_weights(self, gram: Tensor) -> Tensor:
        """``min(1, c / ‖Δ‖) / R``."""
        norms = squared_norms(gram).sqrt()
        return clip_factors(norms, middle(norms) if self.max_norm is None else self.max_norm) / len(gram)


class CenteredClipping(RobustRule, CenteredClippingSettings):
    """``u ← u + mean of clip(Δ_k − u, τ)``, ``w ← w + u``; u is kept between rounds and 0 at first.

    The paper's clients send momenta of their gradients. Here they send updates, and u carries over as the momentum.
    """

    def __post_init__(self) -> None:
        """Start without a step."""
        super().__post_init__()
        self._last: dict[str, Tensor] = {}

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move the shared model by the next u, which is kept in float64."""
        mixed = Combinations(self.rows(updates, round_index).matrix, Differences(updates.end, updates.start))
        vectors = Appended(mixed, [self._last])
        weights = centered_clipping_weights(gram_matrix(vectors), self.radius, self.num_steps)
        step = dict(Combinations(weights[None], vectors))
        self._last = {**self._last, **{name: value[0] for name, value in step.items()}}
        return self.moved_by(updates, step)

    def state_dict(self) -> dict[str, Any]:
        """The last step by parameter."""
        return dict(self._last)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._last = dict(state)
