"""Settings of the rules that withstand clients with arbitrary updates.

They treat all clients alike: a client could lie about its number of training targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fellrec.aggregation.settings.about import About, Limits
from fellrec.aggregation.settings.base import RuleSettings
from fellrec.aggregation.settings.before import RobustSettings
from fellrec.functional.ranges import Count, Natural, Positive


@dataclass(frozen=True)
class CoordinateMedianSettings(RobustSettings):
    """The median of every entry."""

    about: ClassVar[About] = About(
        name="median",
        title="median",
        family="robust",
        summary="one model, moved by the median of the clients' updates, entry by entry",
        paper="Yin et al., ICML 2018, arXiv:1803.01498",
        cost="server: sorts every entry",
        module="coordinatewise",
    )


@dataclass(frozen=True)
class TrimmedMeanSettings(RobustSettings):
    """The mean of every entry without its extremes."""

    about: ClassVar[About] = About(
        name="trimmed_mean",
        title="trimmed mean",
        family="robust",
        summary="one model, moved by the mean of the clients' updates without each entry's f lowest and f highest",
        paper="Yin et al., ICML 2018, arXiv:1803.01498",
        cost="server: sorts every entry",
        module="coordinatewise",
    )
    byzantine: Natural = 1
    """f, entries that are dropped on both sides; 0 is the plain mean. Needs at least 2f + 1 clients in a round."""


_KRUM = "Blanchard et al., NeurIPS 2017, arXiv:1703.02757"


@dataclass(frozen=True)
class KrumSettings(RobustSettings):
    """The update with the nearest neighbours."""

    about: ClassVar[About] = About(
        name="krum",
        title="Krum",
        family="robust",
        summary="one model, moved by the update of the one client whose nearest neighbours are nearest",
        paper=_KRUM,
        cost="server: N² inner products of updates",
    )


@dataclass(frozen=True)
class MultiKrumSettings(RobustSettings):
    """The mean of the best updates by Krum."""

    about: ClassVar[About] = About(
        name="multi_krum",
        title="Multi-Krum",
        family="robust",
        summary="one model, moved by the mean of the updates with the best scores of Krum",
        paper=_KRUM,
        cost="server: N² inner products of updates",
        module="krum",
    )
    num_selected: Count | None = None
    """m, updates in the mean, at most N − f; null: N − f."""


@dataclass(frozen=True)
class GeometricMedianSettings(RobustSettings):
    """The point with the least sum of distances."""

    about: ClassVar[About] = About(
        name="geometric_median",
        title="geometric median",
        family="robust",
        summary="one model, moved by the geometric median of the clients' updates",
        paper="Pillutla et al., IEEE TSP 2022, arXiv:1912.13445",
        cost="server: N² inner products of updates",
    )
    smoothing: Positive = 1e-6
    """ν, least distance that Weiszfeld's iteration divides by, in the unit of updates."""
    num_steps: Count = 1000
    """Steps of Weiszfeld's iteration, if it has not converged before."""


@dataclass(frozen=True)
class BulyanSettings(RobustSettings):
    """Krum, then a mean near the median of every entry."""

    about: ClassVar[About] = About(
        name="bulyan",
        title="Bulyan",
        family="robust",
        summary="one model, moved by the mean of each entry's values nearest to the median of N − 2f updates from Krum",
        paper="El Mhamdi et al., ICML 2018, arXiv:1802.07927",
        cost="server: N² inner products of updates, sorts every entry",
    )


@dataclass(frozen=True)
class NormClippingSettings(RobustSettings):
    """The mean of updates of limited length."""

    about: ClassVar[About] = About(
        name="norm_clipping",
        title="norm clipping",
        family="robust",
        summary="one model, moved by the mean of the clients' updates after those that are too long are shortened",
        paper="Sun et al., 2019, arXiv:1911.07963",
        cost="server: N² inner products of updates",
        module="clipping",
    )
    max_norm: Positive | None = None
    """c, length that an update may have; null: the median of the cohort."""


@dataclass(frozen=True)
class CenteredClippingSettings(RobustSettings):
    """The mean of updates that are not far from the last one."""

    about: ClassVar[About] = About(
        name="centered_clipping",
        title="centered clipping",
        family="robust",
        summary="one model, moved by the last step plus the mean of the updates' clipped differences from it",
        paper="Karimireddy et al., Learning from History, ICML 2021, arXiv:2012.10333",
        cost="server: one more adapter, N² inner products of updates",
        module="clipping",
    )
    radius: Positive | None = None
    """τ, length that a difference may have; null: the median of the cohort. Other implementations have 10 or 100, which
    clips nothing where updates are shorter."""
    num_steps: Count = 1
    """Steps of clipping in a round."""


@dataclass(frozen=True)
class FLTrustSettings(RuleSettings):
    """The mean of updates that agree with that of the server."""

    about: ClassVar[About] = About(
        name="fltrust",
        title="FLTrust",
        family="robust",
        summary="one model, moved by the mean of updates, scaled to the server's own and weighted by the cosine to it",
        paper="Cao et al., NDSS 2021, arXiv:2012.13995",
        cost="server: trains on the public users in every round",
        limits=Limits(needs_public_users=True),
    )
