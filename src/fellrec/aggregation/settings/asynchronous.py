"""Settings of asynchronous rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fellrec.aggregation.settings.about import About, Limits
from fellrec.aggregation.settings.base import RuleSettings
from fellrec.functional.ranges import Count, Fraction, Natural, NotNegative, Positive

_LIMITS = Limits(asynchronous=True)


@dataclass(frozen=True)
class FedAsyncSettings(RuleSettings):
    """Each update changes the server's model when it arrives."""

    about: ClassVar[About] = About(
        name="fedasync",
        title="FedAsync",
        family="asynchronous",
        summary="one model: w ← (1 − a) w + a w_k whenever a client's model arrives, a = α s(staleness)",
        paper="Xie et al., OPT 2020, arXiv:1903.03934",
        sees="sums",
        cost="the server keeps the versions of its model that clients are training from",
        limits=_LIMITS,
    )
    alpha: Fraction = 0.6
    """α, weight of a client's model that is not stale, in (0, 1]."""
    staleness: Literal["constant", "polynomial", "hinge"] = "polynomial"
    """s(d), d the versions since the client received its start. constant: 1; polynomial: (1 + d)^-decay; hinge: 1 up to
    ``tolerance``, then 1 / (decay (d - tolerance) + 1)."""
    decay: NotNegative | None = None
    """How fast s falls; null: the paper's 0.5 for polynomial, 10 for hinge."""
    tolerance: Natural = 4
    """Staleness up to which hinge is 1."""
    mu: NotNegative = 0.005
    """Weight of the proximal term μ/2 ‖v − w‖² in the clients' loss, w the received adapter; 0: none."""


@dataclass(frozen=True)
class FedBuffSettings(RuleSettings):
    """The server's model changes when K updates have arrived."""

    about: ClassVar[About] = About(
        name="fedbuff",
        title="FedBuff",
        family="asynchronous",
        summary="one model: w ← w + η_s/K Σ s(staleness) Δ_k whenever K updates have arrived, s(d) = 1/√(1 + d)",
        paper="Nguyen et al., AISTATS 2022, arXiv:2106.06639",
        sees="sums",
        cost="the server keeps the versions of its model that clients are training from",
        limits=_LIMITS,
    )
    buffer_size: Count | None = None
    """K, updates that change the model; null: the paper's 10, or as many as clients train at the same time if they are
    fewer."""
    server_learning_rate: Positive = 1.0
    """η_s, the server's step size."""
    exponent: NotNegative = 0.5
    """s(d) = (1 + d)^-exponent; 0 counts all updates the same."""
