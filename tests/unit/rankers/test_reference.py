import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fellrec.data.ragged import Ragged
from fellrec.functional.ranking import ranking_metrics, target_ranks
from fellrec.rankers.counting import ClientPopularityRanker, MarkovRanker, PopularityRanker, RandomRanker
from fellrec.rankers.reference import reference_rankers
from fellrec.rankers.settings import ReferenceSettings

ROOT = Path(os.environ.get("FELLREC_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
ML_1M = ROOT / "ml-1m" / "ml-1m.inter"
TRAIN = Ragged.from_rows([[0, 1, 2, 1], [1, 2], [], [3]])


def test_popularity_counts_occurrences():
    scores = PopularityRanker.fit(TRAIN, 5).scores(torch.full((2, 3), -1))
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[1, 3, 2, 1, 0]] * 2


def test_popularity_by_client_counts_the_clients_own_users_only():
    """Users 0 and 3 belong to client 1, user 2 (without interactions) to client 0, user 1 is public."""
    ranker = ClientPopularityRanker.fit(TRAIN, np.array([1, -1, 0, 1]), 5)
    scores = ranker.scores(torch.full((3, 2), -1), {"clients": torch.tensor([1, 0, 1])})
    assert scores.dtype == torch.float32
    assert scores.tolist() == [[1, 2, 1, 1, 0], [0, 0, 0, 0, 0], [1, 2, 1, 1, 0]]


def transitions_by_hand(rows, num_items):
    counts = np.zeros((num_items, num_items))
    for row in rows:
        for before, after in pairwise(row):
            counts[before, after] += 1
    return counts


@pytest.mark.parametrize(("decay", "max_history"), [(0.0, 10), (0.5, 10), (0.5, 2), (1.0, 3)])
def test_markov_weighs_transitions_from_the_last_items(decay, max_history):
    """Transitions are counted in a loop over rows; there are none between rows."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 8, size=n).tolist() for n in (5, 0, 9, 1, 12)]
    counts = transitions_by_hand(rows, 8)
    popularity = np.bincount(np.concatenate(rows).astype(int), minlength=8)
    histories = [[1, 2, 3, 4], [5], [], [7, 0, 7]]
    expected = [
        sum((decay**age * counts[item] for age, item in enumerate(history[::-1][:max_history])), np.zeros(8))
        + 0.01 * popularity / popularity.max()
        for history in histories
    ]
    ranker = MarkovRanker.fit(Ragged.from_rows(rows), 8, decay, max_history)
    scores = ranker.scores(torch.from_numpy(Ragged.from_rows(histories).last(4)))
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-6)


def test_markov_does_not_count_transitions_between_users():
    scores = MarkovRanker.fit(TRAIN, 5).scores(torch.tensor([[1], [2]]))
    assert scores.round().tolist() == [[0, 0, 2, 0, 0], [0, 1, 0, 0, 0]]


def test_random_does_not_depend_on_batches_or_padding():
    histories = torch.tensor([[3, 1, -1], [3, 1, 2], [1, 3, -1], [-1, -1, -1]])
    ranker = RandomRanker(1000, seed=0)
    scores = ranker.scores(histories)
    torch.testing.assert_close(ranker.scores(histories[2:3, :2]), scores[2:3], rtol=0, atol=0)
    assert len({tuple(row.argsort().tolist()) for row in scores}) == 4
    assert not torch.equal(RandomRanker(1000, seed=1).scores(histories), scores)


def test_random_is_uniform():
    histories = torch.arange(400).reshape(200, 2)
    scores = RandomRanker(500, seed=3).scores(histories).double()
    assert ((scores >= 0) & (scores < 1)).all()
    assert scores.mean().item() == pytest.approx(0.5, abs=5 * (1 / 12 / 100_000) ** 0.5)
    assert scores.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert np.abs(np.corrcoef(scores.numpy()) - np.eye(200)).max() < 0.3  # 6.7 standard errors
    target = torch.randint(0, 500, (200,), generator=torch.Generator().manual_seed(0))
    none = torch.tensor([], dtype=torch.long)
    ranks = target_ranks(scores, torch.arange(200), target, none, none).double()
    assert ranks.mean().item() == pytest.approx(249.5, abs=5 * 500 / (12 * 200) ** 0.5)


@pytest.mark.slow
@pytest.mark.skipif(not ML_1M.exists(), reason="MovieLens-1M not found: set FELLREC_TEST_DATA to the data folder")
def test_known_figures_on_movielens_1m():
    """NDCG@10 with leave-one-out, full ranking and all earlier films masked."""
    frame = pd.read_csv(ML_1M, sep="\t", dtype={"user_id:token": str, "item_id:token": str})
    users, items = (pd.factorize(frame[column])[0] for column in ("user_id:token", "item_id:token"))
    order = np.lexsort((frame["timestamp:float"].to_numpy(), users))
    users, items = users[order], items[order]
    num_users, num_items = users.max() + 1, items.max() + 1
    assert (num_users, num_items) == (6040, 3706)
    from_end = pd.Series(users).groupby(users).cumcount(ascending=False).to_numpy()
    train = Ragged.from_pairs(users[from_end > 1], items[from_end > 1], num_users)
    earlier = Ragged.from_pairs(users[from_end > 0], items[from_end > 0], num_users)

    histories = torch.from_numpy(earlier.last(10))
    targets = torch.from_numpy(items[from_end == 0])
    mask = torch.from_numpy(earlier.row_index), torch.from_numpy(earlier.values)
    ndcg = {}
    one_client = np.zeros(num_users, dtype=np.int64)
    settings = ReferenceSettings(show=("random", "popularity", "markov", "markov_decay"))
    for name, ranker in reference_rankers(train, one_client, num_items, settings, seed=0).items():
        ranks = target_ranks(ranker.scores(histories), torch.arange(num_users), targets, *mask)
        ndcg[name] = ranking_metrics(ranks, torch.arange(num_users), num_users, [10])["ndcg_at_10"].mean().item()
    assert ndcg["popularity"] == pytest.approx(0.0194, abs=5e-5)
    assert ndcg["markov"] == pytest.approx(0.112, abs=5e-4)
    assert ndcg["markov_decay"] == pytest.approx(0.126, abs=5e-4)
    # Expectation of a random ranking of about 3,541 unmasked films: the sum of the first ten discounts is 4.54.
    assert ndcg["random"] == pytest.approx(4.54 / 3541, abs=6e-4)
