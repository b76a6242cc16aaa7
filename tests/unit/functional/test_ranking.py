import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score
from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG, RetrievalRecall

from fellrec.errors import ConfigError, DataError, TrainingError
from fellrec.functional import ranking
from fellrec.functional.ranking import check_cutoffs, ranking_metrics, target_ranks

NONE = torch.tensor([], dtype=torch.long)


def ranks_of(scores, targets, masked=(), groups=None):
    """Ranks for lists of (row, item) pairs."""
    target_pairs = torch.tensor(targets, dtype=torch.long).reshape(-1, 2)
    masked_pairs = torch.tensor(list(masked), dtype=torch.long).reshape(-1, 2)
    title_groups = None if groups is None else torch.tensor(groups)
    return target_ranks(torch.tensor(scores), *target_pairs.T, *masked_pairs.T, title_groups).tolist()


def ranks_by_sorting(scores, targets, masked, groups):
    """Sort each row's items as the definition says; the n-th target of a title takes its n-th best position."""
    result, taken = [], {}
    for row, item in targets:
        own_targets = {i for r, i in targets if r == row}
        allowed = [i for i in range(len(groups)) if (row, i) not in masked or i in own_targets]
        titles = {groups[i] for i in own_targets}
        order = sorted(allowed, key=lambda i: (-scores[row][i], groups[i] in titles, i))
        positions = [position for position, i in enumerate(order) if groups[i] == groups[item]]
        nth = taken.get((row, groups[item]), 0)
        taken[row, groups[item]] = nth + 1
        result.append(positions[nth])
    return result


@st.composite
def ranking_problems(draw):
    num_rows, num_items = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    pair = st.tuples(st.integers(0, num_rows - 1), st.integers(0, num_items - 1))
    scores = draw(
        st.lists(
            st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=num_items, max_size=num_items),
            min_size=num_rows,
            max_size=num_rows,
        )
    )
    groups = draw(st.lists(st.integers(0, 3), min_size=num_items, max_size=num_items))
    targets = draw(st.lists(pair, unique=True, max_size=6))
    return scores, targets, draw(st.lists(pair, max_size=6)), groups


@given(ranking_problems())
def test_ranks_follow_the_definition(problem):
    scores, targets, masked, groups = problem
    assert ranks_of(scores, targets, masked, groups) == ranks_by_sorting(scores, targets, masked, groups)
    no_duplicates = list(range(len(groups)))
    expected = ranks_by_sorting(scores, targets, masked, no_duplicates)
    assert ranks_of(scores, targets, masked) == expected
    assert ranks_of(scores, targets, masked, no_duplicates) == expected


@given(ranking_problems())
def test_ranks_of_a_row_are_distinct_and_metrics_are_rates(problem):
    scores, targets, masked, groups = problem
    ranks = ranks_of(scores, targets, masked, groups)
    rows = [row for row, _ in targets]
    assert len(set(zip(rows, ranks, strict=True))) == len(ranks)
    metrics = ranking_metrics(torch.tensor(ranks).long(), torch.tensor(rows).long(), len(scores), [1, 3, 7])
    for values in metrics.values():
        known = values[~values.isnan()]
        assert len(known) == len(set(rows))
        assert ((known >= 0) & (known <= 1 + 1e-12)).all()


@given(ranking_problems(), st.integers(0, 2**21 - 1))
def test_no_rank_among_candidates_is_above_that_among_all_items(problem, bits):
    scores, targets, masked, groups = problem
    drawn = [
        [bool(bits >> (row * len(groups) + item) & 1) for item in range(len(groups))] for row in range(len(scores))
    ]
    pairs = (
        torch.tensor(targets, dtype=torch.long).reshape(-1, 2),
        torch.tensor(masked, dtype=torch.long).reshape(-1, 2),
    )
    sampled = target_ranks(torch.tensor(scores), *pairs[0].T, *pairs[1].T, torch.tensor(groups), torch.tensor(drawn))
    full = ranks_of(scores, targets, masked, groups)
    assert all(few <= every for few, every in zip(sampled.tolist(), full, strict=True))


def test_blocks_do_not_change_ranks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 9, (5, 30), generator=generator).float()
    rows, items = torch.arange(5).repeat(4), torch.arange(20)
    whole = target_ranks(scores, rows, items, NONE, NONE)
    monkeypatch.setattr(ranking, "MAX_COMPARISONS", 70)
    torch.testing.assert_close(target_ranks(scores, rows, items, NONE, NONE), whole, rtol=0, atol=0)


def test_a_single_target_loses_every_tie():
    assert ranks_of([[1.0, 1.0, 1.0, 0.0]], [(0, 0)]) == [2]


def test_tied_targets_are_not_counted_against_each_other():
    assert ranks_of([[1.0, 1.0, 1.0, 2.0]], [(0, 2), (0, 0)]) == [3, 2]


def test_a_target_is_never_masked_and_masked_items_do_not_count():
    assert ranks_of([[3.0, 2.0, 1.0]], [(0, 1)], masked=[(0, 0), (0, 1)]) == [0]


def test_masked_items_do_not_count_if_the_target_has_score_minus_infinity():
    assert ranks_of([[1.0, float("-inf"), float("-inf")]], [(0, 1)], masked=[(0, 0), (0, 2)]) == [0]


def test_the_best_item_with_the_target_title_counts_unless_it_is_masked():
    scores, groups = [[5.0, 4.0, 3.0, 2.0]], [7, 1, 2, 7]
    assert ranks_of(scores, [(0, 3)], groups=groups) == [0]
    assert ranks_of(scores, [(0, 3)], masked=[(0, 0)], groups=groups) == [2]


def test_nan_scores_are_refused():
    with pytest.raises(TrainingError, match="NaN in 1 of 2 rows, first in row 1"):
        ranks_of([[0.0, 1.0], [float("nan"), 1.0]], [(0, 0)])


def test_duplicate_targets_are_refused():
    with pytest.raises(DataError, match="1 targets are duplicates; first: item 1 in row 0"):
        ranks_of([[0.0, 1.0]], [(0, 1), (0, 1)])


@pytest.mark.parametrize(
    ("cutoffs", "message"), [([], "empty"), ([0], "cutoff 0"), ([5, 11], "cutoff 11"), ([True], "True"), ([2.0], "2.0")]
)
def test_invalid_cutoffs_are_refused(cutoffs, message):
    with pytest.raises(ConfigError, match=f"{message}.* from 1 to 10"):
        check_cutoffs(cutoffs, num_items=10)


@pytest.fixture
def untied():
    """Scores without ties, several targets per row, a mask."""
    rng = np.random.default_rng(3)
    scores = rng.permuted(np.tile(np.arange(40.0), (12, 1)), axis=1)
    relevant = rng.random(scores.shape) < 0.1
    relevant[:, 0] = True
    masked = (rng.random(scores.shape) < 0.2) & ~relevant
    return scores, relevant, masked


@pytest.mark.parametrize("cutoff", [1, 5, 20])
def test_metrics_equal_those_of_torchmetrics_and_scikit_learn_without_ties(untied, cutoff):
    scores, relevant, masked = untied
    pairs = [torch.from_numpy(index) for mask in (relevant, masked) for index in np.nonzero(mask)]
    ranks = target_ranks(torch.from_numpy(scores).float(), *pairs)
    ours = ranking_metrics(ranks, pairs[0], len(scores), [cutoff])

    visible = np.where(masked, -1.0 - np.arange(40), scores)
    arguments = (
        torch.from_numpy(visible).float().flatten(),
        torch.from_numpy(relevant).flatten(),
        torch.arange(len(scores)).repeat_interleave(40),
    )
    others = {"ndcg": RetrievalNormalizedDCG, "recall": RetrievalRecall, "hr": RetrievalHitRate, "mrr": RetrievalMRR}
    for name, metric in others.items():
        theirs = metric(top_k=cutoff)(arguments[0], arguments[1], indexes=arguments[2])
        assert ours[f"{name}_at_{cutoff}"].mean().item() == pytest.approx(theirs.item(), rel=1e-5), name
    expected = ndcg_score(relevant.astype(float), visible, k=cutoff)
    assert ours[f"ndcg_at_{cutoff}"].mean().item() == pytest.approx(expected, rel=1e-12)


def test_a_row_without_targets_is_nan_and_not_zero():
    metrics = ranking_metrics(torch.tensor([0]), torch.tensor([1]), 2, [5])
    assert all(values[0].isnan() and values[1] > 0 for values in metrics.values())
