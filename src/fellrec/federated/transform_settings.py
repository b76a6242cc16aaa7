"""Settings of the transforms of updates: ``exchange.transforms``; without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fellrec.functional.ranges import Fraction, NotNegative, Positive, Rate, Seed, check

_GROUP = "exchange.transforms"


@dataclass(frozen=True)
class ClipSettings:
    """Scales a client's update down to a largest norm over all of its parameters."""

    norm: Positive = 1.0
    """Largest norm; with ``quantile`` the first one."""
    quantile: Rate | None = None
    """Fraction of the clients whose updates should be within the norm, which is adapted from round to round (Andrew et
    al. 2021, arXiv:1905.03871); null: the norm is fixed."""
    adaptation_rate: Positive = 0.2
    """η_C of the paper: the norm is multiplied by exp(-η_C (fraction within - quantile)) after each round."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, _GROUP)


@dataclass(frozen=True)
class NoiseSettings:
    """Adds Gaussian noise to every entry of a client's update."""

    std: NotNegative = 0.01
    """Standard deviation. This alone is no differential privacy: that also needs clipping and an accountant."""
    seed: Seed = 0
    """Of the noise; it also depends on round, client and parameter."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, _GROUP)


@dataclass(frozen=True)
class QuantiseSettings:
    """Sends every entry as one of 255 or 15 levels, symmetric about 0, up to its parameter's largest absolute value."""

    bits: Literal[8, 4] = 8
    """Bits of an entry."""
    error_feedback: bool = True
    """Whether what was rounded off is added to the client's next update (Seide et al. 2014)."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, _GROUP)


@dataclass(frozen=True)
class TopKSettings:
    """Sends the entries of each parameter's update with the largest absolute values."""

    fraction: Fraction = 0.1
    """Of the entries of each parameter, at least one."""
    error_feedback: bool = True
    """Whether what was left out is added to the client's next update (Stich et al. 2018)."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, _GROUP)


TRANSFORMS: Mapping[str, Any] = {
    "clip": ("fellrec.federated.transforms.Clip", ClipSettings),
    "noise": ("fellrec.federated.transforms.Noise", NoiseSettings),
    "quantise": ("fellrec.federated.transforms.Quantise", QuantiseSettings),
    "topk": ("fellrec.federated.transforms.TopK", TopKSettings),
}
"""Short name → class and settings."""
