"""Settings of references, plain averages, and optimisers at the server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fellrec.aggregation.settings.about import About, Limits
from fellrec.aggregation.settings.base import MeanSettings, RuleSettings, Weights
from fellrec.functional.ranges import NotNegative, Positive, RateBelow1


@dataclass(frozen=True)
class LocalSettings(RuleSettings):
    """No communication."""

    about: ClassVar[About] = About(
        name="local",
        title="local",
        family="reference",
        summary="every client trains alone, no adapter leaves its client",
        paper="reference",
        sees="nothing",
        limits=Limits(one_rank=False),
    )


@dataclass(frozen=True)
class CentralizedSettings(RuleSettings):
    """All data in one place."""

    about: ClassVar[About] = About(
        name="centralized",
        title="centralised",
        family="reference",
        summary="one model is trained on the pooled data of all clients; not federated",
        paper="reference",
        sees="nothing",
    )


@dataclass(frozen=True)
class FedAvgSettings(RuleSettings):
    """The mean by number of training targets."""

    about: ClassVar[About] = About(
        name="fedavg",
        title="FedAvg",
        family="average",
        summary="one model: the mean of the clients' adapters, weighted by number of training targets",
        paper="McMahan et al., AISTATS 2017, arXiv:1602.05629",
        sees="sums",
    )


@dataclass(frozen=True)
class UniformSettings(RuleSettings):
    """The plain mean."""

    about: ClassVar[About] = About(
        name="uniform",
        title="uniform",
        family="average",
        summary="one model: the plain mean of the clients' adapters",
        paper="FedAvg with equal weights",
        sees="sums",
    )


@dataclass(frozen=True)
class FedProxSettings(RuleSettings):
    """FedAvg with a proximal term in the clients' loss."""

    about: ClassVar[About] = About(
        name="fedprox",
        title="FedProx",
        family="average",
        summary="FedAvg; clients add μ/2 ‖v − w‖², w the received adapter, to their loss",
        paper="Li et al., MLSys 2020, arXiv:1812.06127",
        sees="sums",
    )
    mu: NotNegative = 0.01
    """μ, weight of the proximal term; 0 is FedAvg. The paper searches 0.001 to 1."""
    weights: Weights = "samples"
    """How much clients count in the mean."""


@dataclass(frozen=True)
class FedAvgMSettings(RuleSettings):
    """A momentum at the server."""

    about: ClassVar[About] = About(
        name="fedavgm",
        title="FedAvgM",
        family="average",
        summary="one model, moved by a momentum over the mean updates of all rounds",
        paper="Hsu et al., 2019, arXiv:1909.06335",
        sees="sums",
        cost="server: one more adapter",
    )
    server_learning_rate: Positive = 1.0
    """η_s, what the momentum is multiplied by."""
    momentum: RateBelow1 = 0.9
    """β; 0 is FedAvg."""
    weights: Weights = "samples"
    """How much clients count in the mean update."""


@dataclass(frozen=True)
class FedOptSettings(RuleSettings):
    """What the adaptive optimisers at the server have in common."""

    server_learning_rate: Positive = 1e-3
    """η_s: about the step of every entry, whatever the size of the updates. LoRA updates are 1e-5 to 1e-3."""
    beta1: RateBelow1 = 0.9
    """β₁, of the running mean of updates."""
    tau: Positive = 1e-6
    """τ, added to the root of the second moment, whose first value is τ²."""
    weights: Weights = "samples"
    """How much clients count in the mean update."""


def _fedopt(name: str, title: str, summary: str) -> About:
    return About(
        name=name,
        title=title,
        family="average",
        summary=summary,
        paper="Reddi et al., Adaptive Federated Optimization, ICLR 2021, arXiv:2003.00295",
        sees="sums",
        cost="server: two more adapters",
        module="fedopt",
    )


@dataclass(frozen=True)
class FedAdagradSettings(FedOptSettings):
    """Adagrad at the server."""

    about: ClassVar[About] = _fedopt(
        "fedadagrad", "FedAdagrad", "one model, moved by Adagrad at the server, with the mean update as gradient"
    )
    beta1: RateBelow1 = 0.0
    """β₁, of the running mean of updates."""


@dataclass(frozen=True)
class FedAdamSettings(FedOptSettings):
    """Adam at the server."""

    about: ClassVar[About] = _fedopt(
        "fedadam", "FedAdam", "one model, moved by Adam at the server, with the mean update as gradient"
    )
    beta2: RateBelow1 = 0.99
    """β₂, of the running mean of squared updates."""


@dataclass(frozen=True)
class FedYogiSettings(FedOptSettings):
    """Yogi at the server."""

    about: ClassVar[About] = _fedopt(
        "fedyogi",
        "FedYogi",
        "one model, moved by Yogi at the server: the second moment changes by at most (1 − β₂) Δ²",
    )
    beta2: RateBelow1 = 0.99
    """β₂, how fast the second moment changes."""


@dataclass(frozen=True)
class ScaffoldSettings(RuleSettings):
    """Control variates."""

    about: ClassVar[About] = About(
        name="scaffold",
        title="SCAFFOLD",
        family="average",
        summary="one model; control variates c − c_k correct the clients' gradients",
        paper="Karimireddy et al., ICML 2020, arXiv:1910.06378",
        sees="sums",
        cost="traffic: twice FedAvg's; clients: one more adapter; server: one more",
    )
    server_learning_rate: Positive = 1.0
    """η_s, what the mean update is multiplied by."""
    weights: Weights = "equal"
    """How much clients count in the mean update; the paper's are equal. Control variates count the same."""


@dataclass(frozen=True)
class FedNovaSettings(MeanSettings):
    """Updates divided by the clients' numbers of local steps."""

    about: ClassVar[About] = About(
        name="fednova",
        title="FedNova",
        family="average",
        summary="one model: FedAvg of updates per local step, so that clients with more steps do not count more",
        paper="Wang et al., NeurIPS 2020, arXiv:2007.07481",
        sees="sums",
        limits=Limits(reads_steps=True),
    )
