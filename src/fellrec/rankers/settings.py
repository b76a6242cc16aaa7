"""Settings of rankers: ``references`` and ``ranker``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from fellrec.functional.ranges import Count, NotNegative, check, distinct, items, number

PRETRAINED = "pretrained"
"""The backbone before any round: no ranker of this package, but shown beside them."""
SHOWN = ("random", "popularity", "client_popularity", "markov", "markov_decay", "item_knn", "mf", PRETRAINED)
"""What ``references.show`` can name, in the order of the table."""


@dataclass(frozen=True)
class ReferenceSettings:
    """Rankers without a language model, shown beside the learned rules on the same users."""

    show: Annotated[Sequence[str], distinct(SHOWN)] = SHOWN
    """Which of them, such as [popularity,markov]."""
    neighbours: Count = 20
    """Of ``item_knn``: most similar items that are kept for each."""
    shrink: NotNegative = 10.0
    """Of ``item_knn``: added to the cosine's denominator; damps similarities that rest on few users."""
    factors: Count = 64
    """Of ``mf``: factors of the truncated SVD; small data give fewer."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "references")


@dataclass(frozen=True)
class LikelihoodSettings:
    """Log-likelihood of each title after the prompt."""

    normalise: Literal["mean", "sum"] = "mean"
    """Over a title's tokens: their mean, or their sum, which prefers short titles."""
    max_batch_tokens: Count = 65536
    """Tokens of prompts and titles in one forward pass: bounds the memory."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "ranker")


@dataclass(frozen=True)
class ConstrainedSettings:
    """Beam search in which only titles of the catalogue can be written."""

    num_beams: Count = 20
    """Beginnings of titles that are followed for each user; as many as there are titles: the exact ranking by
    log-likelihood."""
    max_batch_tokens: Count = 65536
    """Tokens of prompts and titles, over all beams, in one forward pass: bounds the memory."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "ranker")


Gamma = Annotated[float, number(lambda x: x >= 0, "a number of at least 0")]
Gammas = Annotated[Sequence[float], items(number(lambda x: x >= 0, "a number of at least 0"), "a list of such numbers")]


@dataclass(frozen=True)
class GroundingSettings:
    """The model writes a title, and items are ranked by the distance of theirs (BIGRec)."""

    max_new_tokens: Count = 32
    """Longest generated title in tokens."""
    num_beams: Count = 1
    """Beams; 1 is greedy."""
    batch_size: Count = 256
    """Beams written, and texts embedded, at once: bounds the memory."""
    reweight: Literal["none", "popularity", "collaborative"] = "none"
    """Weights of the distances beside the titles: how often an item occurs, or how often it followed the user's last
    items, in training."""
    gamma: Gamma | Gammas = (0, 0.1, 0.3, 1, 3, 10, 30)
    """Exponent of the weight; of a list, validation chooses one (the smallest of equally good ones)."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "ranker")
