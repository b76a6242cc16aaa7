"""Settings of differential privacy on updates: ``privacy``; without PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fellrec.functional.ranges import Between0And1, Positive, check


@dataclass(frozen=True)
class PrivacySettings:
    """Whose data the shared model does not reveal, and how well: differential privacy of the updates."""

    unit: Literal["none", "user", "client"] = "none"
    """What is protected: all data of a user, where every client is one (``partition=per_user``); all data of a client;
    or nothing."""
    epsilon: Positive | None = None
    """ε that all rounds together may reach; the noise follows from it. null: with unit none."""
    delta: Between0And1 | None = None
    """δ of the same guarantee, below 1 / number of clients. null: with unit none."""
    clip_norm: Positive = 1.0
    """Norm C that an update is clipped to, over all exchanged parameters; with ``clip_quantile`` the first one."""
    clip_quantile: Between0And1 | None = None
    """Fraction of the clients whose updates should be within the norm, which follows a noised count of them from round
    to round (Andrew et al. 2021, arXiv:1905.03871); null: the norm is fixed."""
    clip_rate: Positive = 0.2
    """η_C of the paper: the norm is multiplied by exp(-η_C (noised fraction within - quantile)) after each round."""
    count_std: Positive | None = None
    """Standard deviation of the count's noise; null: a 20th of the expected cohort, as in the paper, at least the noise
    multiplier."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "privacy", *self._problems())

    @property
    def is_on(self) -> bool:
        """Whether updates are protected."""
        return self.unit != "none"

    def _problems(self) -> list[str | None]:
        budget = {"epsilon": self.epsilon, "delta": self.delta}
        missing = [name for name, value in budget.items() if value is None]
        given = [f"privacy.{name}={value}" for name, value in budget.items() if value is not None]
        if self.is_on and missing:
            return [f"privacy.{name}=null is not allowed with privacy.unit={self.unit}" for name in missing]
        if not self.is_on and given:
            ways = "privacy=user_level or privacy=client_level"
            return [f"{' and '.join(given)} has no effect with privacy=none: give {ways}"]
        if isinstance(self.epsilon, float) and math.isfinite(self.epsilon) and self.epsilon > 500:
            return [f"privacy.epsilon={self.epsilon} is not allowed: at most 500, which protects nothing"]
        return []
