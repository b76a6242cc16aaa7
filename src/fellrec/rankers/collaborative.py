"""Collaborative filtering on the binary user-item matrix of the training interactions: item-kNN and PureSVD.

The input is the set of a user's items, without order and repetition: with an evaluation batch all items that the user
has seen, else the items of the histories.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from fellrec.data.ragged import IntArray, Ragged
from fellrec.errors import DataError

_CELLS = 1 << 24
"""Maximum number of similarities in memory at the same time."""


class ItemKNNRanker:
    """Item-kNN: sum of an item's similarities to those of the user's items that are its neighbours.

    See Sarwar et al. 2001. The similarity of two items is the shrunk cosine of their columns of the user-item matrix:
    users of both / (sqrt(users of one · users of the other) + shrink).

    Args:
        similarity: ``[I, I]`` sparse; column ``i`` has the similarities of item ``i`` to its neighbours.
    """

    def __init__(self, similarity: sparse.csr_array) -> None:
        self.similarity = similarity

    @classmethod
    def fit(cls, train: Ragged, num_items: int, neighbours: int, shrink: float) -> ItemKNNRanker:
        """Compute each item's neighbours in ``train``, in blocks of items.

        Args:
            train: Training sequences, one row per user.
            num_items: I.
            neighbours: Number of neighbours per item.
            shrink: Term added to the denominator of the cosine.
        """
        matrix = _binary(train.row_index, train.values, (len(train), num_items)).tocsc()
        norms = np.sqrt(matrix.sum(axis=0))
        block = max(1, _CELLS // num_items)
        kept = [
            _nearest(matrix, norms, np.arange(first, min(first + block, num_items)), neighbours, shrink)
            for first in range(0, num_items, block)
        ]
        return cls(sparse.csr_array(sparse.vstack(kept, format="csr").T))

    def scores(self, histories: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """``[B, I]`` float32 sums of similarities."""
        known = known_items(histories, batch, self.similarity.shape[0])
        return torch.from_numpy((known @ self.similarity).toarray().astype(np.float32)).to(histories.device)


class PureSVDRanker:
    """PureSVD (Cremonesi et al. 2010): projects a user's row x of the user-item matrix on the factors, x V Vᵀ.

    Users that are not in the training data are scored in the same way.

    Args:
        factors: ``[F, I]`` orthonormal rows.
    """

    def __init__(self, factors: NDArray[np.float64]) -> None:
        self.factors = factors

    @classmethod
    def fit(cls, train: Ragged, num_items: int, factors: int) -> PureSVDRanker:
        """Factorise ``train``.

        Args:
            train: Training sequences, one row per user.
            num_items: I.
            factors: F; reduced for small data sets.

        Raises:
            DataError: If there are fewer than two users or items.
        """
        from sklearn.decomposition import TruncatedSVD

        matrix = _binary(train.row_index, train.values, (len(train), num_items))
        if min(matrix.shape) < 2:
            raise DataError("the baseline mf needs at least two users and two items; leave it out of references.show")
        # Exact; the randomised algorithm is an approximation that depends on its seed.
        svd = TruncatedSVD(min(factors, min(matrix.shape) - 1), algorithm="arpack", random_state=0).fit(matrix)
        return cls(svd.components_)

    def scores(self, histories: Tensor, batch: Mapping[str, Tensor] | None = None) -> Tensor:
        """``[B, I]`` float32 projected rows of the users."""
        known = known_items(histories, batch, self.factors.shape[1])
        return torch.from_numpy(((known @ self.factors.T) @ self.factors).astype(np.float32)).to(histories.device)


def known_items(histories: Tensor, batch: Mapping[str, Tensor] | None, num_items: int) -> sparse.csr_array:
    """Binary matrix ``[B, I]`` of the users' items.

    Args:
        histories: ``[B, H]`` int64, padded with -1.
        batch: Evaluation batch with the users' seen items, ``seen_rows`` and ``seen_items`` ``[M]``; ``None`` to
            use the items of the histories.
        num_items: I.
    """
    shape = (len(histories), num_items)
    if batch is not None:
        return _binary(batch["seen_rows"].cpu().numpy(), batch["seen_items"].cpu().numpy(), shape)
    items = histories.cpu().numpy()
    rows, columns = np.nonzero(items >= 0)
    return _binary(rows, items[rows, columns], shape)


def _binary(rows: IntArray, items: IntArray, shape: tuple[int, int]) -> sparse.csr_array:
    """Binary matrix with ones at the given positions, which may repeat."""
    found = sparse.csr_array(sparse.coo_array((np.ones(len(rows)), (rows, items)), shape=shape))
    found.data[:] = 1.0
    return found


def _nearest(
    matrix: sparse.csc_array, norms: NDArray[np.float64], items: NDArray[np.int64], neighbours: int, shrink: float
) -> sparse.csr_array:
    """Similarities of the given items to their nearest neighbours, ``[len(items), I]``."""
    together = (matrix[:, items].T @ matrix).toarray()
    denominator = np.outer(norms[items], norms) + shrink
    similarity = np.divide(together, denominator, out=np.zeros_like(together), where=together > 0)
    similarity[np.arange(len(items)), items] = 0.0  # items are not their own neighbours
    count = min(neighbours, similarity.shape[1])
    nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
    rows = np.repeat(np.arange(len(items)), count)
    values = similarity[rows, nearest.ravel()]
    found = sparse.csr_array(sparse.coo_array((values, (rows, nearest.ravel())), shape=similarity.shape))
    found.eliminate_zeros()
    return found
