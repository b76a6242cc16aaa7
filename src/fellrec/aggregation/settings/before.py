"""Settings of what is done to updates before a robust rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from fellrec.aggregation.settings.base import RuleSettings
from fellrec.functional.ranges import Count, Natural, Seed, distinct

STEPS = ("nnm", "bucketing", "arc")
"""Nearest-neighbour mixing (Allouah et al., AISTATS 2023, arXiv:2302.01772), bucketing (Karimireddy et al., ICLR 2022,
arXiv:2006.09365), adaptive robust clipping (Allouah et al., ICLR 2025, arXiv:2405.14432)."""


@dataclass(frozen=True)
class RobustSettings(RuleSettings):
    """Base of the settings of a robust rule: what it withstands, and steps before it."""

    byzantine: Natural = 1
    """f, arbitrary clients that are withstood; a round needs at least 2f + 1 clients, with krum and multi_krum 2f + 3,
    with bulyan 4f + 3."""
    before: Annotated[Sequence[str], distinct(STEPS)] = ()
    """Steps before the rule, in their order: nnm (each update becomes the mean of the N − f nearest), bucketing (means
    of random groups) and arc (the longest updates are shortened)."""
    bucket_size: Count = 2
    """Clients in a group of bucketing."""
    bucket_seed: Seed = 0
    """Of bucketing's groups, which change from round to round."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        super().__post_init__()
        object.__setattr__(self, "before", tuple(self.before))  # a list in a configuration
