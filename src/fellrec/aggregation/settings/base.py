"""What the settings of all aggregation rules have in common."""

from __future__ import annotations

from dataclasses import dataclass

from fellrec.functional.ranges import check


@dataclass(frozen=True)
class RuleSettings:
    """Base of the settings of a rule: their ranges are checked when the rule is made."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "aggregation")
