"""What the settings of all aggregation rules have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fellrec.functional.ranges import check

Weights = Literal["samples", "equal"]
"""How much clients count: by their numbers of training targets, or all the same."""


@dataclass(frozen=True)
class RuleSettings:
    """Base of the settings of a rule: their ranges are checked when the rule is made."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "aggregation")


@dataclass(frozen=True)
class MeanSettings(RuleSettings):
    """Base of the settings of a rule that takes a mean over clients."""

    weights: Weights = "samples"
    """How much clients count in the mean."""
