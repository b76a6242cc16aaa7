"""Simple non-learned rankers: random, popularity and first-order Markov. See `fellrec.rankers.reference`."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from fellrec.data.ragged import IntArray, Ragged
from fellrec.functional.rng import scramble

TIE_BREAK = 0.01
"""Popularity term of the most popular item in the Markov ranker, in transitions."""


class RandomRanker:
    """Random scores.

    A score is a hash of seed, history and item, so it does not depend on batches, processes or padding.

    Args:
        num_items: I.
        seed: Any integer.
    """

    def __init__(self, num_items: int, seed: int) -> None:
        self.num_items = num_items
        self.seed = seed

    def scores(self, histories: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """``[B, I]`` float32, uniform in [0, 1)."""
        # Padding becomes 0, which does not change the hash.
        items: NDArray[np.uint64] = (histories.cpu().numpy() + 1).astype(np.uint64)
        catalogue: NDArray[np.uint64] = np.arange(self.num_items, dtype=np.uint64)
        seed = np.array([self.seed % 2**64], dtype=np.uint64)
        place = scramble(np.arange(items.shape[1], dtype=np.uint64) + scramble(seed))
        rows = scramble(np.sum(items * place, axis=1, dtype=np.uint64))
        cells = scramble(rows[:, None] + catalogue)
        return torch.from_numpy((cells >> np.uint64(40)).astype(np.float32) / np.float32(2**24)).to(histories.device)


class PopularityRanker:
    """Ranks items by their number of interactions.

    Args:
        counts: ``[I]`` number of interactions of each item.
    """

    def __init__(self, counts: NDArray[np.int64]) -> None:
        self.counts = torch.from_numpy(np.asarray(counts, dtype=np.float32))

    @classmethod
    def fit(cls, train: Ragged, num_items: int) -> PopularityRanker:
        """Count the interactions of each item in ``train``."""
        return cls(np.bincount(train.values, minlength=num_items))

    def scores(self, histories: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """``[B, I]`` float32 counts, the same in every row."""
        return self.counts.to(histories.device).expand(len(histories), -1).clone()


class ClientPopularityRanker:
    """Ranks items by their number of interactions at the user's client; items without any are tied at the end.

    Args:
        counts: ``[C, I]`` sparse, number of interactions of each item at each client.
    """

    def __init__(self, counts: sparse.csr_array) -> None:
        self.counts = counts

    @classmethod
    def fit(cls, train: Ragged, client_of_user: IntArray, num_items: int) -> ClientPopularityRanker:
        """Count the interactions of each item in ``train`` by client; public users (client -1) do not count."""
        clients = client_of_user[train.row_index]
        owned = clients >= 0
        shape = (int(client_of_user.max()) + 1, num_items)
        pairs = (clients[owned], train.values[owned])
        return cls(sparse.coo_array((np.ones(len(pairs[0])), pairs), shape=shape).tocsr())

    def scores(self, histories: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """``[B, I]`` float32 counts at each user's client.

        Args:
            histories: ``[B, H]`` int64; only their device is used.
            batch: Evaluation batch with ``clients`` ``[B]`` int64.
        """
        assert batch is not None, "ClientPopularityRanker needs an evaluation batch"
        counts = self.counts[batch["clients"].cpu().numpy()].toarray()
        return torch.from_numpy(counts.astype(np.float32)).to(histories.device)


class MarkovRanker:
    """First-order Markov chain: scores an item by its number of transitions from the user's last items.

    Ties are broken by popularity, which adds at most `TIE_BREAK` transitions.

    Args:
        transitions: ``[I, I]`` sparse, number of transitions from row to column.
        counts: ``[I]`` number of interactions of each item.
        decay: Weight ``decay ** age`` of the transitions from earlier items, in [0, 1]; 0 uses only the last item.
        max_history: Number of last items that are used.
    """

    def __init__(
        self, transitions: sparse.csr_array, counts: NDArray[np.int64], decay: float = 0.0, max_history: int = 10
    ) -> None:
        self.transitions = transitions
        self.tie_break = TIE_BREAK * counts / max(counts.max(initial=0), 1)
        self.decay = decay
        self.max_history = max_history

    @classmethod
    def fit(cls, train: Ragged, num_items: int, decay: float = 0.0, max_history: int = 10) -> MarkovRanker:
        """Count interactions, and transitions between consecutive items of each row, in ``train``."""
        follows = train.positions[1:] > 0  # false at the start of a row
        before, after = train.values[:-1][follows], train.values[1:][follows]
        ones = np.ones(len(before))
        transitions = sparse.coo_array((ones, (before, after)), shape=(num_items, num_items)).tocsr()
        return cls(transitions, np.bincount(train.values, minlength=num_items), decay, max_history)

    def scores(self, histories: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """``[B, I]`` float32 weighted number of transitions from the last items."""
        items = histories.cpu().numpy()
        age = (items >= 0).sum(axis=1, keepdims=True) - 1 - np.arange(items.shape[1])
        rows, columns = np.nonzero((items >= 0) & (age < self.max_history))
        weights = np.power(float(self.decay), age[rows, columns])  # 0 ** 0 is 1
        shape = (len(items), self.transitions.shape[0])
        last_items = sparse.coo_array((weights, (rows, items[rows, columns])), shape=shape).tocsr()
        scores = (last_items @ self.transitions).toarray() + self.tie_break
        return torch.from_numpy(scores.astype(np.float32)).to(histories.device)
