"""Settings of the rules that treat LoRA's factors A and B in different ways."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from fellrec.aggregation.settings.about import About, Limits
from fellrec.aggregation.settings.base import MeanSettings, RuleSettings
from fellrec.errors import ConfigError
from fellrec.functional.ranges import Between0And1, NotNegative, Positive, Rate, Seed

_HALVES = Limits(needs_lora=True)
_FACTORS = Limits(needs_lora=True, no_remote_server=True)
_RANKS = Limits(needs_lora=True, no_remote_server=True, one_rank=False)
_BASE = Limits(needs_lora=True, no_remote_server=True, changes_base=True)

RankWeights = Literal["norms", "samples", "equal"]
"""How much clients count: by the norm of their products over all layers, by training targets, or all the same."""


@dataclass(frozen=True)
class FFALoRASettings(MeanSettings):
    """B is trained, A stays as it was drawn."""

    about: ClassVar[About] = About(
        name="ffa_lora",
        title="FFA-LoRA",
        family="LoRA-aware",
        summary="one model: A is frozen and the same for all clients, the mean of B is exact",
        paper="Sun et al., ICLR 2024, arXiv:2403.12313",
        sees="sums",
        cost="half the traffic of FedAvg",
        limits=_HALVES,
        is_exact=True,
        module="lora_halves",
    )


@dataclass(frozen=True)
class RoLoRASettings(MeanSettings):
    """B and A are trained in turns."""

    about: ClassVar[About] = About(
        name="rolora",
        title="RoLoRA",
        family="LoRA-aware",
        summary="one model: rounds 0, 2, … train and average B, rounds 1, 3, … A; each mean is exact",
        paper="Chen et al., NeurIPS 2025, arXiv:2502.01755",
        sees="sums",
        cost="half the traffic of FedAvg",
        limits=_HALVES,
        is_exact=True,
        module="lora_halves",
    )


@dataclass(frozen=True)
class FedSALoRASettings(MeanSettings):
    """A is shared, B is personal."""

    about: ClassVar[About] = About(
        name="fedsa_lora",
        title="FedSA-LoRA",
        family="LoRA-aware",
        summary="all clients share the mean of A, each keeps its own B and is served with it",
        paper="Guo et al., ICLR 2025, arXiv:2410.01463",
        sees="sums",
        cost="half the traffic of FedAvg",
        limits=_HALVES,
        module="lora_halves",
    )


@dataclass(frozen=True)
class LoRAFAIRSettings(MeanSettings):
    """The mean of B is corrected."""

    about: ClassVar[About] = About(
        name="lora_fair",
        title="LoRA-FAIR",
        family="LoRA-aware",
        summary="one model: means of A and B, with a correction of B towards the mean of products",
        paper="Bian et al., ICCV 2025, arXiv:2411.14961",
        cost="server: N·r inner products per layer",
        limits=_FACTORS,
        module="lora_fair",
    )
    strength: Positive = 0.01
    """λ, weight of the squared size of the correction; the larger, the nearer to FedAvg."""


@dataclass(frozen=True)
class FedRotLoRASettings(MeanSettings):
    """Factors are rotated towards the received ones before they are averaged."""

    about: ClassVar[About] = About(
        name="fedrot_lora",
        title="FedRot-LoRA",
        family="LoRA-aware",
        summary="one model: means of A and B after each client's pair is rotated, which leaves its product unchanged",
        paper="Zhang et al., ICML 2026, arXiv:2602.23638",
        cost="N decompositions of r × r matrices per layer",
        limits=_FACTORS,
        module="fedrot_lora",
    )
    strength: Rate = 0.5
    """λ, how far towards the best rotation; 0 is FedAvg, 1 the best rotation."""


@dataclass(frozen=True)
class FLoRASettings(MeanSettings):
    """The stacked factors of all clients go into the base."""

    about: ClassVar[About] = About(
        name="flora",
        title="FLoRA",
        family="LoRA-aware",
        summary="the exact mean of products is added to the base; every round begins with a new adapter",
        paper="Wang et al., NeurIPS 2024, arXiv:2409.05976",
        cost="download N times as large; the base changes and is exported",
        limits=replace(_BASE, one_rank=False),
        is_exact=True,
        module="lora_base",
    )
    seed: Seed = 0
    """Of the new values of A; a run gives its own."""


@dataclass(frozen=True)
class FedExLoRASettings(MeanSettings):
    """What the means of factors miss goes into the base."""

    about: ClassVar[About] = About(
        name="fedex_lora",
        title="FedEx-LoRA",
        family="LoRA-aware",
        summary="means of A and B; what their product misses of the mean of products is added to the base",
        paper="Singhal et al., ACL 2025, arXiv:2410.09432",
        cost="download N times as large; the base changes and is exported",
        limits=_BASE,
        is_exact=True,
        module="lora_base",
    )


@dataclass(frozen=True)
class FlexLoRASettings(MeanSettings):
    """The mean of products is decomposed."""

    about: ClassVar[About] = About(
        name="flexlora",
        title="FlexLoRA",
        family="LoRA-aware",
        summary="one model: the product of rank r that is nearest to the mean of products, by SVD",
        paper="Bai et al., NeurIPS 2024, arXiv:2402.11505",
        cost="server: a decomposition of size N·r per layer",
        limits=_RANKS,
        module="lora_svd",
    )


@dataclass(frozen=True)
class FedSVDSettings(MeanSettings):
    """B is trained; the product is decomposed, so that A changes between rounds."""

    about: ClassVar[About] = About(
        name="fedsvd",
        title="FedSVD",
        family="LoRA-aware",
        summary="FFA-LoRA whose A becomes the right singular vectors of the product after every round",
        paper="Lee et al., NeurIPS 2025, arXiv:2505.12805",
        sees="sums",
        cost="half the upload of FedAvg; server: a decomposition of size r per layer",
        limits=_FACTORS,
        is_exact=True,
        module="lora_svd",
    )


@dataclass(frozen=True)
class HetLoRASettings(RuleSettings):
    """Means of factors of different ranks, padded with zeros."""

    about: ClassVar[About] = About(
        name="hetlora",
        title="HetLoRA",
        family="LoRA-aware",
        summary="means of zero-padded A and B, weighted by the norm of products; each client gets the part of its rank",
        paper="Cho et al., EMNLP 2024, arXiv:2401.06432",
        cost="none; less for clients of small ranks",
        limits=_RANKS,
    )
    weights: RankWeights = "norms"
    """How much clients count in the means: norms (of their products, over all layers), samples or equal."""
    prune_to: Between0And1 | None = None
    """γ, the part of its rank r that a client keeps, ⌊γr⌋ but at least 1, when ‖B[:, γr:]‖ ‖A[γr:]‖, summed over
    layers, is smaller after local training than before; the paper has 0.99. null: ranks stay."""
    prune_strength: NotNegative = 0.0
    """λ, weight of that sum in the clients' loss; needs ``prune_to``."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        if self.prune_strength and self.prune_to is None:
            raise ConfigError(f"aggregation.prune_strength={self.prune_strength} needs aggregation.prune_to")


@dataclass(frozen=True)
class RBLASettings(RuleSettings):
    """Means of each row of A, and column of B, over the clients that have it."""

    about: ClassVar[About] = About(
        name="rbla",
        title="RBLA",
        family="LoRA-aware",
        summary="means of each row of A and column of B over the clients that have it; each gets the part of its rank",
        paper="Chen et al., 2024, arXiv:2408.08699",
        cost="none; less for clients of small ranks",
        limits=_RANKS,
        module="hetlora",
    )
    weights: RankWeights = "samples"
    """How much clients count in the means: norms (of their products, over all layers), samples or equal."""


@dataclass(frozen=True)
class FedSBSettings(MeanSettings):
    """The matrix R of LoRA-SB is averaged."""

    about: ClassVar[About] = About(
        name="fed_sb",
        title="Fed-SB",
        family="LoRA-aware",
        summary="one model: the mean of R between a common A and B, which are frozen, is exact; needs adapter=lora_sb",
        paper="Singhal et al., 2025, arXiv:2502.15436",
        sees="sums",
        cost="none; r² numbers a layer are sent, whatever the size of the layer",
        limits=Limits(needs_adapter="lora_sb"),
        is_exact=True,
        module="lora_cores",
    )


@dataclass(frozen=True)
class RAVANSettings(MeanSettings):
    """The products of each head's matrix and factor are averaged."""

    about: ClassVar[About] = About(
        name="ravan",
        title="RAVAN",
        family="LoRA-aware",
        summary="one model: the mean of s_i H_i of every head, then s_i = 1, is exact; needs adapter=lora_heads",
        paper="Raje et al., NeurIPS 2025, arXiv:2506.05568",
        cost="none; r² + 1 numbers a head are sent, whatever the size of the layer",
        limits=Limits(needs_adapter="lora_heads"),
        is_exact=True,
        module="lora_cores",
    )
