"""Settings of rules with a model of its own for every client, or for every cluster of clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fellrec.aggregation.settings.about import About, Limits
from fellrec.aggregation.settings.base import RuleSettings, Weights
from fellrec.functional.ranges import (
    Count,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Rate,
    Seed,
    items,
    number,
    whole,
)

Layers = Annotated[Sequence[int], items(whole(0), "a list of numbers of layers, each once, such as [0,1]", True)]
OpenRate = Annotated[float, number(lambda x: 0 < x < 1, "a number between 0 and 1")]
Personal = Literal["tail", "b"] | Layers
"""The part of the adapter that never leaves its client."""


@dataclass(frozen=True)
class DittoSettings(RuleSettings):
    """A shared model, and a personal one beside it."""

    about: ClassVar[About] = About(
        name="ditto",
        title="Ditto",
        family="personalised",
        summary="FedAvg's model, and a personal one a client with λ/2 ‖v − w‖² added to its loss; that one is tested",
        paper="Li et al., ICML 2021, arXiv:2012.04221",
        sees="sums",
        cost="clients: twice the local training, one more adapter",
    )
    lam: NotNegative = 0.1
    """λ, how much personal models are held near the received shared one; 0 is `local`. The authors try 0.1, 1, 2."""
    weights: Weights = "samples"
    """How much clients count in the shared model."""


@dataclass(frozen=True)
class APFLSettings(RuleSettings):
    """A shared model, a personal one beside it, and a mixture of both."""

    about: ClassVar[About] = About(
        name="apfl",
        title="APFL",
        family="personalised",
        summary="FedAvg's model w, and a personal v a client, trained by gradients at α v + (1 − α) w, which is tested",
        paper="Deng, Kamani and Mahdavi, 2020, arXiv:2003.13461",
        sees="sums",
        cost="clients: twice the local training, one more adapter",
        limits=Limits(whole_model=True),
    )
    alpha: Rate = 0.5
    """α, the part of v in the mixture, at first. 0 evaluates FedAvg's model, 1 local training. The authors' program has
    0.5, fluke 0.25, PFLlib 1."""
    alpha_rate: NotNegative = 0.1
    """Step size of α, which each client adapts; 0 keeps it. The paper takes the local learning rate."""
    weights: Weights = "samples"
    """How much clients count in the shared model."""


@dataclass(frozen=True)
class FedPerSettings(RuleSettings):
    """A personal part, trained together with the shared one."""

    about: ClassVar[About] = About(
        name="fedper",
        title="FedPer",
        family="personalised",
        summary="FedAvg of a part of the adapter; the other part is trained with it and never leaves its client",
        paper="Arivazhagan et al., 2019, arXiv:1912.00818",
        sees="sums",
        cost="traffic: only the shared part",
    )
    personal: Personal = "tail"
    """What is personal: the tail of the split (``split.tail_layers``), b for LoRA's factors B, or numbers of layers."""
    weights: Weights = "samples"
    """How much clients count in the mean."""


@dataclass(frozen=True)
class FedRepSettings(RuleSettings):
    """A personal part, trained before the shared one."""

    about: ClassVar[About] = About(
        name="fedrep",
        title="FedRep",
        family="personalised",
        summary="as fedper, but in each round first the personal part is trained, then the shared one",
        paper="Collins et al., ICML 2021, arXiv:2102.07078",
        sees="sums",
        cost="traffic: only the shared part",
    )
    personal: Personal = "tail"
    """What is personal: the tail of the split (``split.tail_layers``), b for LoRA's factors B, or numbers of layers."""
    personal_share: OpenRate = 0.5
    """Part of a round's optimiser steps that train the personal part. The paper: 10 epochs of 11."""
    weights: Weights = "samples"
    """How much clients count in the mean."""


@dataclass(frozen=True)
class FedAMPSettings(RuleSettings):
    """Attention over models by their distance."""

    about: ClassVar[About] = About(
        name="fedamp",
        title="FedAMP",
        family="personalised",
        summary="each client is pulled towards a mixture of the models that are near its own",
        paper="Huang et al., AAAI 2021, arXiv:2007.03797",
        cost="server: N² inner products of adapters; clients: one more adapter",
    )
    mu: NotNegative = 0.1
    """λ / α_K, strength of the pull towards the mixture; 0 is `local`."""
    attention: Rate = 1.0
    """Largest weight of all other clients together in a mixture."""
    sigma: Positive = 1.0
    """σ, in units of the median squared distance of two clients; the smaller, the fewer clients count."""


@dataclass(frozen=True)
class PFedMeSettings(RuleSettings):
    """Moreau envelopes."""

    about: ClassVar[About] = About(
        name="pfedme",
        title="pFedMe",
        family="personalised",
        summary="personal models θ near local ones w_k, which follow θ slowly and are averaged",
        paper="Dinh et al., NeurIPS 2020, arXiv:2006.08848",
        sees="sums",
        cost="clients and server: one more adapter",
        limits=Limits(no_transforms=True),  # which apply to θ, and w_k is sent
    )
    lam: Positive = 15.0
    """λ, how much θ is held near w_k."""
    inner_steps: Count = 5
    """K, optimiser steps of θ for each step of w_k."""
    outer_rate: Fraction = 0.075
    """η λ, the part of the way to θ that w_k goes. The authors' program has η 0.005 and λ 15."""
    beta: Fraction = 1.0
    """β, the part of the way to the mean of all w_k that the shared model goes."""
    weights: Weights = "samples"
    """How much clients count in the mean."""


@dataclass(frozen=True)
class CFLSettings(RuleSettings):
    """Clusters that are split where updates disagree."""

    about: ClassVar[About] = About(
        name="cfl",
        title="CFL",
        family="personalised",
        summary="FedAvg within clusters, which are split in two where the clients' updates cancel out",
        paper="Sattler et al., 2020, arXiv:1910.01991",
        cost="server: N² inner products of updates",
        limits=Limits(all_clients=True),
    )
    eps1: Fraction = 0.4
    """ε₁: a cluster is split if its mean update is shorter than this part of its longest update."""
    eps2: NotNegative = 0.1
    """ε₂: and if its longest update is longer than this part of the longest one of the first round."""
    first_round: Natural = 3
    """The first round, from 0, in which clusters are split."""
    min_clients: Count = 2
    """Clients of a cluster at least."""
    linkage: Literal["complete", "single"] = "complete"
    """How a cluster is split: complete, as in the authors' program, or single, the paper's optimum."""
    weights: Weights = "samples"
    """How much clients count in the mean of their cluster."""


@dataclass(frozen=True)
class IFCASettings(RuleSettings):
    """Clusters that clients choose."""

    about: ClassVar[About] = About(
        name="ifca",
        title="IFCA",
        family="personalised",
        summary="the server has several models; each client trains that with the lowest loss on its data",
        paper="Ghosh et al., NeurIPS 2020, arXiv:2006.04088",
        cost="traffic: all models down; clients: a pass over the training data for each",
    )
    num_clusters: Count = 2
    """M, models of the server; 1 is FedAvg."""
    noise: Positive = 0.1
    """Standard deviation of what the models differ by at first, as a part of the root mean square of each parameter."""
    seed: Seed = 0
    """Of that noise."""
    weights: Weights = "equal"
    """How much clients count in the mean of their cluster; the paper's are equal."""


@dataclass(frozen=True)
class FedFomoSettings(RuleSettings):
    """First-order model optimisation."""

    about: ClassVar[About] = About(
        name="fedfomo",
        title="FedFomo",
        family="personalised",
        summary="before training, each client moves towards the models of others that have a lower loss on its data",
        paper="Zhang et al., ICLR 2021, arXiv:2012.08565",
        cost="traffic: M models down; clients: M + 1 passes over held-out rows, and fewer rows to train on",
    )
    num_models: Count = 5
    """M, models of others that a client asks for in a round."""
    held_out: OpenRate = 0.2
    """Fraction of each client's training rows that measure losses and are not trained on."""


@dataclass(frozen=True)
class FedALTSettings(RuleSettings):
    """A client's own LoRA beside the mean of the others'."""

    about: ClassVar[About] = About(
        name="fedalt",
        title="FedALT",
        family="personalised",
        summary="own LoRA beside a frozen one, the mean of the others', mixed for each token; needs adapter=lora_mixed",
        paper="Bian et al., AAAI 2026, arXiv:2503.11880",
        cost="clients: one more adapter in every forward pass, and a router",
        limits=Limits(needs_adapter="lora_mixed"),
    )
