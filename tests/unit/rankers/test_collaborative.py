"""Item-kNN and PureSVD against dense implementations of their definitions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fellrec.data.ragged import Ragged
from fellrec.rankers import collaborative
from fellrec.rankers.collaborative import ItemKNNRanker, PureSVDRanker
from fellrec.rankers.reference import ReferenceRanker

USERS, ITEMS = 40, 12


@pytest.fixture(scope="module")
def dense() -> np.ndarray:
    """The last item has no interaction; no user has all items."""
    matrix = np.random.default_rng(0).random((USERS, ITEMS)) < np.linspace(0.6, 0.0, ITEMS)
    return matrix.astype(float)


@pytest.fixture(scope="module")
def train(dense: np.ndarray) -> Ragged:
    return Ragged.from_rows([np.flatnonzero(row)[::-1].tolist() for row in dense])


def batch_of(train: Ragged, users: list[int]) -> dict[str, torch.Tensor]:
    seen = train.take(np.array(users))
    return {"seen_rows": torch.from_numpy(seen.row_index), "seen_items": torch.from_numpy(seen.values)}


def similarity_by_hand(dense: np.ndarray, neighbours: int, shrink: float) -> np.ndarray:
    """A loop over pairs of items: row ``i`` has the neighbours of item ``i``."""
    found = np.zeros((ITEMS, ITEMS))
    for i in range(ITEMS):
        for j in range(ITEMS):
            both = np.dot(dense[:, i], dense[:, j])
            if i != j and both > 0:
                found[i, j] = both / (np.linalg.norm(dense[:, i]) * np.linalg.norm(dense[:, j]) + shrink)
        found[i, np.argsort(-found[i])[neighbours:]] = 0
    return found


@pytest.mark.parametrize(("neighbours", "shrink"), [(3, 0.0), (3, 20.0), (100, 5.0)])
@pytest.mark.parametrize("cells", [ITEMS, 5 * ITEMS, 1 << 24])
def test_item_knn_equals_its_definition_with_any_block_size(
    dense: np.ndarray, train: Ragged, neighbours: int, shrink: float, cells: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collaborative, "_CELLS", cells)
    similarity = similarity_by_hand(dense, neighbours, shrink)
    ranker = ItemKNNRanker.fit(train, ITEMS, neighbours, shrink)
    users = [3, 0, 7]
    scores = ranker.scores(torch.from_numpy(train.take(np.array(users)).last(2)), batch_of(train, users))
    assert scores.dtype == torch.float32
    # The score of item i sums over the user's items j that are neighbours of i.
    np.testing.assert_allclose(scores, dense[users] @ similarity.T, rtol=1e-6, atol=1e-7)


def test_item_knn_without_shrinkage_is_scikit_learns_cosine(dense: np.ndarray, train: Ragged) -> None:
    from sklearn.metrics.pairwise import cosine_similarity

    expected = cosine_similarity(dense.T)
    np.fill_diagonal(expected, 0)
    found = ItemKNNRanker.fit(train, ITEMS, ITEMS, shrink=0.0).similarity.toarray()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factors", [2, 5])
def test_pure_svd_projects_on_the_first_right_singular_vectors(dense: np.ndarray, train: Ragged, factors: int) -> None:
    """The scores are x V Vᵀ with V of NumPy's SVD; the projection does not depend on the signs of the vectors."""
    first = np.linalg.svd(dense)[2][:factors]
    users = [5, 1]
    ranker = PureSVDRanker.fit(train, ITEMS, factors)
    scores = ranker.scores(torch.full((2, 1), -1), batch_of(train, users))
    np.testing.assert_allclose(scores, dense[users] @ first.T @ first, rtol=1e-5, atol=1e-6)
    again = PureSVDRanker.fit(train, ITEMS, factors).scores(torch.full((2, 1), -1), batch_of(train, users))
    assert torch.equal(scores, again)


def knn(train: Ragged, neighbours: int = 20, shrink: float = 10.0) -> ItemKNNRanker:
    return ItemKNNRanker.fit(train, ITEMS, neighbours, shrink)


def svd(train: Ragged, factors: int = 64) -> PureSVDRanker:
    return PureSVDRanker.fit(train, ITEMS, factors)


@pytest.mark.parametrize("fit", [knn, svd])
def test_scores_use_all_seen_items_of_the_batch_else_those_of_the_histories(
    train: Ragged, fit: Callable[[Ragged], ReferenceRanker]
) -> None:
    """A user who is not in the training data is scored from the set of their items."""
    ranker = fit(train)
    rows, items = torch.tensor([0, 0, 0]), torch.tensor([4, 2, 9])
    known = {"seen_rows": rows, "seen_items": items}
    whole = ranker.scores(torch.tensor([[9]]), known)
    torch.testing.assert_close(ranker.scores(torch.tensor([[2, 9, 4, 9, -1]])), whole, rtol=0, atol=0)
    assert not torch.equal(ranker.scores(torch.tensor([[9]])), whole)


def test_neighbours_and_factors_are_limited_by_the_number_of_items(train: Ragged) -> None:
    assert svd(train, 500).factors.shape == (ITEMS - 1, ITEMS)
    assert knn(train, 500).similarity.shape == (ITEMS, ITEMS)
