"""Settings of the rules that give every client a mixture of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from fellrec.aggregation.settings.about import About
from fellrec.aggregation.settings.base import RuleSettings
from fellrec.functional.ranges import Allowed, NotNegative, Positive, Rate, whole

SketchSize = Annotated[
    int,
    Allowed(
        lambda value: whole(16, 2**24).accepts(value) and value & (value - 1) == 0, "a power of two from 16 to 16777216"
    ),
]


@dataclass(frozen=True)
class FELLRecSettings(RuleSettings):
    """FELLRec's dynamic balance strategy (METHOD section 3)."""

    about: ClassVar[About] = About(
        name="fellrec",
        title="FELLRec",
        family="personalised",
        summary="each client mixes adapters of similar clients, fewer of them early and at high loss",
        paper="Zhao et al., A Federated Framework for LLM-based Recommendation, 2024, arXiv:2402.09959",
        cost="server: N² inner products of adapters",
    )
    alpha: NotNegative = 0.7
    """α of the learning speed, (3) in docs/aggregation.md; 0 is `local`: no communication."""
    beta: Positive = 5.0
    """β of (3), rounds over which heating continues; the larger, the slower."""
    temperature: Positive = 0.05
    """τ of (2), of the softmax over client losses."""
    attention: bool = True
    """Whether similarities weigh the senders, (1)."""
    heating: bool = True
    """Whether difficulties slow the receivers, (2) and (3)."""
    similarity: Literal["update", "parameters", "sketch"] = "update"
    """What is compared: the round's updates (end minus start), the parameters, or random projections of the updates
    (docs/secure_sums.md)."""
    sketch_size: SketchSize = 4096
    """With ``similarity=sketch``: numbers of a projection; a cosine's standard error is at most √(2 / size)."""
    fidelity: Literal["paper", "released_code"] = "paper"
    """paper, or released_code for the authors' program with its mistakes: exponent ``t + 1/beta``, no heating at
    ``beta = 1``, raw parameters compared whatever ``similarity`` is, and mixing in place in client order. The weights
    are computed before anything is mixed."""


@dataclass(frozen=True)
class UpdateMixingSettings(RuleSettings):
    """Mixing of updates instead of adapters (docs/updatemixing.md)."""

    about: ClassVar[About] = About(
        name="updatemixing",
        title="update mixing",
        family="personalised",
        summary="each client adds a mixture of similar clients' updates to its own adapter",
        paper="this project, docs/updatemixing.md",
        cost="server: N² inner products of updates",
    )
    own_share: Rate = 0.0
    """o of (U2): what a client takes of its own update on top; 1 is `local`."""
    server_learning_rate: Positive = 1.0
    """η of (U3): what the mixed update is multiplied by."""
    attention: bool = True
    """Whether similarities weigh the senders, (U1)."""


@dataclass(frozen=True)
class PersistenceSettings(RuleSettings):
    """Persistence-weighted mixing (docs/persistence.md)."""

    about: ClassVar[About] = About(
        name="persistence",
        title="persistence",
        family="personalised",
        summary="each client keeps of its own adapter what its updates repeat over rounds, and takes an average",
        paper="this project, docs/persistence.md",
        cost="server: one sketch of 16 kB a client",
    )
    exponent: Positive = 1.0
    """Of (P2); the smaller, the more a client keeps of its own."""
    others: Literal["similar", "equal", "samples"] = "similar"
    """The average that a client's own is mixed with: similar, FELLRec's similarities of the round's updates with rows
    divided by their sums; equal, ``1 / N``; samples, FedAvg's weights."""
