"""Rankers without a language model that stand beside every learned one. Cheap, strong, and they keep everyone honest.

All give ``scores(histories) -> [B, I]`` float32, higher is better, with ``histories`` ``[B, H]`` int64, oldest first,
padded with -1 on the right. They compute on the CPU and give scores on the histories' device. None masks anything.
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
"""Reproduces the figure this project is measured against: NDCG@10 0.126 on ML-1M (0.5 would reach 0.132)."""


class ReferenceRanker(Protocol):
    """What all reference rankers have in common."""

    def scores(self, histories: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """Score all items.

        Args:
            histories: ``[B, H]`` int64, padded with -1 on the right.
            batch: The evaluation batch that they come from, for rankers that look at more than the last items: the
                users' ``clients``, and all they have seen as ``masked_rows`` and ``masked_items``.

        Returns:
            ``[B, I]`` float32.
        """
        ...


@dataclass(frozen=True)
class ReferenceSettings:
    """What of the reference rankers can be set.

    Attributes:
        neighbours: See `ItemKNNRanker.fit`.
        shrink: See `ItemKNNRanker.fit`.
        factors: See `PureSVDRanker.fit`.
        seed: Of the random ranker.
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
"""Names of all reference rankers, in the order of the table."""

PRETRAINED = "pretrained"
"""The backbone before any round: no ranker of this module, but shown beside them."""

SHOWN = (*REFERENCES, PRETRAINED)
"""What ``references.show`` can name."""


def reference_rankers(
    train: Ragged,
    client_of_user: IntArray,
    num_items: int,
    settings: ReferenceSettings,
    names: Sequence[str] = REFERENCES,
) -> dict[str, ReferenceRanker]:
    """Fit reference rankers, by name.

    They are fitted on the training interactions alone, as the learned ones are; at test time what they score from also
    has the validation item. On ML-1M (leave-one-out, 6,040 users, 3,706 films, earlier films masked) NDCG@10 is 0.001
    for random, 0.0194 for popularity, 0.112 and 0.126 for the Markov rankers, 0.039 for item-kNN and 0.049 for MF.

    Args:
        train: Training sequences, one row per user, oldest first.
        client_of_user: ``[U]`` int64; -1 is a public user.
        num_items: I.
        settings: Numbers of neighbours and factors, the seed.
        names: Of `REFERENCES`.
    """
    return {name: _FITS[name](train, client_of_user, num_items, settings) for name in names}
