"""Settings of rankers: ``references`` and ``ranker``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fellrec.functional.ranges import Count, NotNegative, check, distinct, items, number

PRETRAINED = "pretrained"
"""Name of the backbone before the first round, which is shown beside the reference rankers."""
SHOWN = ("random", "popularity", "client_popularity", "markov", "markov_decay", "item_knn", "mf", PRETRAINED)
"""Allowed values in ``references.show``, in the order of tables."""


@dataclass(frozen=True)
class ReferenceSettings:
    """Rankers without a language model, shown beside the learned rules on the same users."""

    show: Annotated[Sequence[str], distinct(SHOWN)] = SHOWN
    """Names of those to show, such as [popularity,markov]."""
    neighbours: Count = 20
    """Of ``item_knn``: number of neighbours per item."""
    shrink: NotNegative = 10.0
    """Of ``item_knn``: term added to the denominator of the cosine; damps similarities that rest on few users."""
    factors: Count = 64
    """Of ``mf``: factors of the truncated SVD; reduced for small data sets."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "references")


@dataclass(frozen=True)
class LikelihoodSettings:
    """Log-likelihood of each title after the prompt."""

    normalise: Literal["mean", "sum"] = "mean"
    """mean over a title's tokens, or their sum, which favours short titles."""
    max_batch_tokens: Count = 65536
    """Maximum number of tokens in one forward pass: bounds the memory."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "ranker")


@dataclass(frozen=True)
class ConstrainedSettings:
    """Beam search over the trie of all titles of the catalogue."""

    num_beams: Count = 20
    """Number of prefixes per user in the beam; as many as there are titles: the exact ranking by log-likelihood."""
    max_batch_tokens: Count = 65536
    """Maximum number of tokens, over all beams, in one forward pass: bounds the memory."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "ranker")


Gamma = Annotated[float, number(lambda x: x >= 0, "a number of at least 0")]
Gammas = Annotated[Sequence[float], items(number(lambda x: x >= 0, "a number of at least 0"), "a list of such numbers")]


@dataclass(frozen=True)
class GroundingSettings:
    """The model generates a title, and items are ranked by the distance of their titles to it (BIGRec)."""

    max_new_tokens: Count = 32
    """Maximum length of a generated title in tokens."""
    num_beams: Count = 1
    """Number of beams; 1 is greedy decoding."""
    batch_size: Count = 256
    """Number of texts per embedding batch, and of beams per generation batch: bounds the memory."""
    reweight: Literal["none", "popularity", "collaborative"] = "none"
    """Weights of the distances: the items' popularity in training, or their number of transitions from the user's last
    items."""
    gamma: Gamma | Gammas = (0, 0.1, 0.3, 1, 3, 10, 30)
    """Exponent of the weight, or a list, from which validation selects one (the smallest in case of ties)."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "ranker")
