"""Reference rankers: non-learned and classical baselines without a language model.

All have ``scores(histories) -> [B, I]`` float32, higher is better, with ``histories`` ``[B, H]`` int64, oldest first,
padded with -1 on the right. They compute on the CPU and return scores on the device of the histories, without masking.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fellrec.data.ragged import IntArray, Ragged
from fellrec.rankers.collaborative import ItemKNNRanker, PureSVDRanker
from fellrec.rankers.counting import ClientPopularityRanker, MarkovRanker, PopularityRanker, RandomRanker

REFERENCE_DECAY = 0.25
"""Decay of ``markov_decay``, with NDCG@10 0.126 on ML-1M (0.132 with 0.5)."""


class ReferenceRanker(Protocol):
    """Interface of the reference rankers."""

    def scores(self, histories: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """Score all items.

        Args:
            histories: ``[B, H]`` int64, padded with -1 on the right.
            batch: The evaluation batch of the histories, for rankers that need the users' ``clients`` or all their seen
                items (``masked_rows`` and ``masked_items``).

        Returns:
            ``[B, I]`` float32.
        """
        ...


@dataclass(frozen=True)
class ReferenceSettings:
    """Settings of the reference rankers.

    Attributes:
        neighbours: See `ItemKNNRanker.fit`.
        shrink: See `ItemKNNRanker.fit`.
        factors: See `PureSVDRanker.fit`.
        seed: Seed of the random ranker.
    """

    neighbours: int = 20
    shrink: float = 10.0
    factors: int = 64
    seed: int = 0


_FITS: dict[str, Callable[[Ragged, IntArray, int, ReferenceSettings], ReferenceRanker]] = {
    "random": lambda train, clients, num_items, how: RandomRanker(num_items, how.seed),
    "popularity": lambda train, clients, num_items, how: PopularityRanker.fit(train, num_items),
    "client_popularity": lambda train, clients, num_items, how: ClientPopularityRanker.fit(train, clients, num_items),
    "markov": lambda train, clients, num_items, how: MarkovRanker.fit(train, num_items),
    "markov_decay": lambda train, clients, num_items, how: MarkovRanker.fit(train, num_items, decay=REFERENCE_DECAY),
    "item_knn": lambda train, clients, num_items, how: ItemKNNRanker.fit(train, num_items, how.neighbours, how.shrink),
    "mf": lambda train, clients, num_items, how: PureSVDRanker.fit(train, num_items, how.factors),
}
REFERENCES = tuple(_FITS)
"""Names of the reference rankers, in the order of tables."""

PRETRAINED = "pretrained"
"""Name of the backbone before the first round, which is shown beside the reference rankers."""

SHOWN = (*REFERENCES, PRETRAINED)
"""Allowed values in ``references.show``."""


def reference_rankers(
    train: Ragged,
    client_of_user: IntArray,
    num_items: int,
    settings: ReferenceSettings,
    names: Sequence[str] = REFERENCES,
) -> dict[str, ReferenceRanker]:
    """Fit reference rankers on the training interactions, by name.

    At test time their input also contains the validation item, as for learned models. On ML-1M (leave-one-out, 6,040
    users, 3,706 films, earlier films masked) NDCG@10 is 0.001 for random, 0.0194 for popularity, 0.112 and 0.126 for
    the Markov rankers, 0.039 for item-kNN and 0.049 for MF.

    Args:
        train: Training sequences, one row per user, oldest first.
        client_of_user: ``[U]`` int64; -1 is a public user.
        num_items: I.
        settings: Settings of the rankers.
        names: Names from `REFERENCES`.
    """
    return {name: _FITS[name](train, client_of_user, num_items, settings) for name in names}
