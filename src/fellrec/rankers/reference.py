"""Non-learned baselines: rankers without a language model, shown beside every learned one.

All give ``scores(histories) -> [B, I]`` float32, higher is better, with ``histories`` ``[B, H]`` int64, oldest first,
padded with -1 on the right. They compute on the CPU and give scores on the histories' device. None masks anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

from fellrec.data.ragged import IntArray, Ragged
from fellrec.rankers.collaborative import ItemKNNRanker, PureSVDRanker
from fellrec.rankers.counting import ClientPopularityRanker, MarkovRanker, PopularityRanker, RandomRanker
from fellrec.rankers.settings import PRETRAINED, ReferenceSettings

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


_FITS: dict[str, Callable[[Ragged, IntArray, int, ReferenceSettings, int], ReferenceRanker]] = {
    "random": lambda train, clients, size, how, seed: RandomRanker(size, seed),
    "popularity": lambda train, clients, size, how, seed: PopularityRanker.fit(train, size),
    "client_popularity": lambda train, clients, size, how, seed: ClientPopularityRanker.fit(train, clients, size),
    "markov": lambda train, clients, size, how, seed: MarkovRanker.fit(train, size),
    "markov_decay": lambda train, clients, size, how, seed: MarkovRanker.fit(train, size, decay=REFERENCE_DECAY),
    "item_knn": lambda train, clients, size, how, seed: ItemKNNRanker.fit(train, size, how.neighbours, how.shrink),
    "mf": lambda train, clients, size, how, seed: PureSVDRanker.fit(train, size, how.factors),
}


def reference_rankers(
    train: Ragged,
    client_of_user: IntArray,
    num_items: int,
    settings: ReferenceSettings,
    seed: int,
) -> dict[str, ReferenceRanker]:
    """Fit the reference rankers that ``settings.show`` names, by name.

    They are fitted on the training interactions alone, as the learned ones are; at test time what they score from also
    has the validation item. On ML-1M (leave-one-out, 6,040 users, 3,706 films, earlier films masked) NDCG@10 is 0.001
    for random, 0.0194 for popularity, 0.112 and 0.126 for the Markov rankers, 0.039 for item-kNN and 0.049 for MF.

    Args:
        train: Training sequences, one row per user, oldest first.
        client_of_user: ``[U]`` int64; -1 is a public user.
        num_items: I.
        settings: Which, and numbers of neighbours and factors.
        seed: Of the random ranker.
    """
    return {
        name: _FITS[name](train, client_of_user, num_items, settings, seed)
        for name in settings.show
        if name != PRETRAINED
    }
