import pytest
import torch
from torchmetrics import MetricCollection

from fellrec.errors import ConfigError
from fellrec.functional.ranking import ranking_metrics, target_ranks
from fellrec.metrics import MRR, NDCG, HitRate, Recall
from fellrec.metrics import ranking as module


@pytest.fixture
def batch():
    """Scores of 6 users, targets in no order of rows, one user without targets, a mask."""
    scores = torch.randn(6, 30, generator=torch.Generator().manual_seed(0))
    target_rows = torch.tensor([4, 0, 1, 0, 3, 5, 4])
    target_items = torch.tensor([3, 9, 27, 1, 14, 2, 8])
    return scores, target_rows, target_items, torch.tensor([0, 1, 5]), torch.tensor([4, 4, 7])


@pytest.mark.parametrize(("metric", "name"), [(NDCG, "ndcg"), (Recall, "recall"), (HitRate, "hr"), (MRR, "mrr")])
def test_each_class_is_the_mean_over_users_with_targets(batch, metric, name):
    expected = ranking_metrics(target_ranks(*batch), batch[1], 6, [20])[f"{name}_at_20"]
    assert expected.isnan().sum() == 1
    ours = metric(20)
    ours.update(*batch)
    ours.update(*batch)
    assert ours.compute().item() == pytest.approx(expected.nanmean().item(), rel=1e-14)


def test_a_collection_ranks_once(batch, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "target_ranks", lambda *a: calls.append(a) or target_ranks(*a))
    collection = MetricCollection(
        {"ndcg_at_5": NDCG(5), "ndcg_at_10": NDCG(10), "hr_at_5": HitRate(5), "mrr_at_5": MRR(5)}
    )
    for _ in range(3):
        collection.update(*batch)
    assert len(collection.compute_groups) == 1
    assert len(calls) == 4 + 2  # the first update is each metric's own, by which torchmetrics finds the group
    alone = NDCG(10)
    alone.update(*batch)
    assert collection.compute()["ndcg_at_10"].item() == pytest.approx(alone.compute().item(), rel=1e-14)


def test_a_cutoff_beyond_the_catalogue_is_refused(batch):
    with pytest.raises(ConfigError, match=r"cutoff 31; allowed are integers from 1 to 30"):
        NDCG(31).update(*batch)
