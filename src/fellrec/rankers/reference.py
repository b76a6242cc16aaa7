"""Reference rankers: non-learned and classical baselines without a language model.

All have ``scores(histories) -> [B, I]`` float32, higher is better, with ``histories`` ``[B, H]`` int64, oldest first,
padded with -1 on the right. They compute on the CPU and return scores on the device of the histories, without masking.
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
"""Decay of ``markov_decay``, with NDCG@10 0.126 on ML-1M (0.132 with 0.5)."""


class ReferenceRanker(Protocol):
    """Interface of the reference rankers."""

    def scores(self, histories: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """Score all items.

        Args:
            histories: ``[B, H]`` int64, padded with -1 on the right.
            batch: The evaluation batch of the histories, for rankers that need the users' ``clients`` or all their seen
                items (``seen_rows`` and ``seen_items``).

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
    """Fit the reference rankers in ``settings.show`` on the training interactions, by name.

    At test time their input also contains the validation item, as for learned models. On ML-1M (leave-one-out, 6,040
    users, 3,706 films, earlier films masked) NDCG@10 is 0.001 for random, 0.0194 for popularity, 0.112 and 0.126 for
    the Markov rankers, 0.039 for item-kNN and 0.049 for MF.

    Args:
        train: Training sequences, one row per user, oldest first.
        client_of_user: ``[U]`` int64; -1 is a public user.
        num_items: I.
        settings: Names and settings of the rankers.
        seed: Seed of the random ranker.
    """
    return {
        name: _FITS[name](train, client_of_user, num_items, settings, seed)
        for name in settings.show
        if name != PRETRAINED
    }
