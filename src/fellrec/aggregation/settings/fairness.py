"""Settings of the rules that favour clients who fare worse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from fellrec.aggregation.settings.about import About, Limits
from fellrec.aggregation.settings.base import RuleSettings, Weights
from fellrec.functional.ranges import Natural, NotNegative, Positive, Rate

_START_LOSS = "clients: one pass over their training data"


@dataclass(frozen=True)
class QFedAvgSettings(RuleSettings):
    """Clients with larger losses count more."""

    about: ClassVar[About] = About(
        name="qfedavg",
        title="q-FedAvg",
        family="fair",
        summary="one model; clients count by the q-th power of their loss, and the step is shorter where losses curve",
        paper="Li et al., Fair Resource Allocation, ICLR 2020, arXiv:1905.10497",
        cost=f"{_START_LOSS}; server: N norms of updates",
    )
    q: NotNegative = 1.0
    """The larger, the more equal the losses are meant to become; 0 is the plain mean. The paper has 0.1 to 5."""
    lipschitz: Positive = 1.0
    """L, updates times which are gradients: the larger, the shorter the step. The paper has 1 / learning rate."""


@dataclass(frozen=True)
class AFLSettings(RuleSettings):
    """The worst mixture of clients."""

    about: ClassVar[About] = About(
        name="afl",
        title="AFL",
        family="fair",
        summary="one model, trained for the worst mixture of clients; the mean over all rounds is served",
        paper="Mohri et al., Agnostic Federated Learning, ICML 2019, arXiv:1902.00146",
        cost=f"{_START_LOSS}; server: one more adapter",
        limits=Limits(all_clients=True),
    )
    server_learning_rate: Positive = 1.0
    """η, of the step by the weighted mean of updates."""
    gamma: NotNegative = 0.01
    """γ, how fast the clients' weights follow their losses; 0 keeps them equal. The paper has 0.01 to 0.1."""


@dataclass(frozen=True)
class FedMGDASettings(RuleSettings):
    """A direction that is good for every client."""

    about: ClassVar[About] = About(
        name="fedmgda",
        title="FedMGDA+",
        family="fair",
        summary="one model, moved along the shortest mean of unit updates with weights near the clients' shares",
        paper="Hu et al., FedMGDA+, IEEE TNSE 2022, arXiv:2006.11489",
        cost="server: N² inner products of updates, a quadratic program of size N",
    )
    epsilon: Rate = 0.1
    """ε, how far a weight may be from the client's share; 0 keeps the shares, 1 allows all weights."""
    server_learning_rate: Positive = 1.0
    """η_s, what the direction is multiplied by, see ``step_length``."""
    step_length: Literal["mean_norm", "fixed"] = "mean_norm"
    """mean_norm: η_s counts in the mean length of the cohort's updates; fixed: in the unit of parameters, as in the
    paper, where 1 is far too long for an adapter."""
    weights: Weights = "samples"
    """The clients' shares: by samples or equal."""


@dataclass(frozen=True)
class FedFVSettings(RuleSettings):
    """Updates without conflicts."""

    about: ClassVar[About] = About(
        name="fedfv",
        title="FedFV",
        family="fair",
        summary="one model, moved by the mean of updates after what conflicts with other clients is projected away",
        paper="Wang et al., Federated Learning with Fair Averaging, IJCAI 2021, arXiv:2104.14937",
        cost=f"{_START_LOSS}; server: N² inner products, updates of the last τ rounds if clients are absent",
    )
    alpha: Rate = 0.1
    """α, share of the clients, those with the largest losses and at least one, whose updates are not projected."""
    tau: Natural = 1
    """τ, rounds for which an absent client's last update counts. The paper has 0 to 10."""


@dataclass(frozen=True)
class TERMSettings(RuleSettings):
    """Exponential weights by loss."""

    about: ClassVar[About] = About(
        name="term",
        title="TERM",
        family="fair",
        summary="one model: the mean of the clients' adapters, with weights by the exponential of their losses",
        paper="Li et al., Tilted Empirical Risk Minimization, ICLR 2021, arXiv:2007.01162",
        sees="sums",
        cost=_START_LOSS,
    )
    tilt: float = 1.0
    """t: above 0 favours clients with large losses, below 0 those with small ones; 0 is FedAvg. Usual are 0.1 to 2."""
    weights: Weights = "samples"
    """The clients' shares, which are multiplied by the exponential."""


@dataclass(frozen=True)
class FedHEALSettings(RuleSettings):
    """Entries that a client moves the same way again and again."""

    about: ClassVar[About] = About(
        name="fedheal",
        title="FedHEAL",
        family="fair",
        summary="one model; only entries of an update that keep their direction count, and clients far away count more",
        paper="Chen et al., FedHEAL, CVPR 2024, arXiv:2405.16585",
        cost="server: one more adapter a client",
    )
    threshold: Rate = 0.3
    """θ: an entry counts if more than this share of the client's earlier updates moved it in the same direction."""
    beta: Rate = 0.4
    """β, weight of this round in the running mean of the clients' distances; 0 keeps equal weights."""
