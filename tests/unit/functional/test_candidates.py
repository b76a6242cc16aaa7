"""Ranking among sampled candidates: properties of sampling without replacement."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, hypergeom

from fellrec.functional.candidates import SampledCandidates
from fellrec.functional.ranking import target_ranks

NONE = torch.tensor([], dtype=torch.long)


def test_drawn_items_are_allowed_and_depend_on_seed_and_user_only() -> None:
    users = torch.tensor([3, 9, 4, 7])
    allowed = torch.rand(4, 60, generator=torch.Generator().manual_seed(0)) < 0.5
    allowed[3, 2:] = False
    drawn = SampledCandidates(10, seed=1).draw(users, allowed)
    assert not (drawn & ~allowed).any()
    assert drawn.sum(dim=1).tolist() == [10, 10, 10, int(allowed[3].sum())], "all allowed items if there are fewer"
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(SampledCandidates(10, seed=1).draw(users[order], allowed[order]), drawn[order])
    assert not torch.equal(SampledCandidates(10, seed=2).draw(users, allowed), drawn)
    every = torch.ones(2, 60, dtype=torch.bool)
    first, second = SampledCandidates(10, seed=1).draw(torch.tensor([0, 1]), every)
    assert not torch.equal(first, second)


def test_every_item_is_drawn_equally_often() -> None:
    drawn = SampledCandidates(7, seed=0).draw(torch.arange(3000), torch.ones(3000, 40, dtype=torch.bool))
    counts = drawn.sum(dim=0).numpy()
    # Without replacement the variance is smaller than the chi-square test assumes, by (n - N) / (n - 1).
    statistic = chisquare(counts).statistic / (33 / 39)
    assert statistic < 74, "the 99.9 % point of chi-square with 39 degrees is 72.06; the seed is fixed"
    assert np.corrcoef(drawn[:-1].float().flatten(), drawn[1:].float().flatten())[0, 1] == pytest.approx(0, abs=0.01)


def test_the_rank_among_a_sample_is_hypergeometric() -> None:
    """If r of n items precede a target, N r / n of N sampled items precede it on average."""
    num_users, n, num, before = 4000, 50, 20, 12
    scores = torch.arange(n + 1.0).flip(0).expand(num_users, -1)
    rows, items = torch.arange(num_users), torch.full((num_users,), before)
    allowed = torch.ones(num_users, n + 1, dtype=torch.bool)
    allowed[rows, items] = False
    drawn = SampledCandidates(num, seed=5).draw(torch.arange(num_users), allowed)
    ranks = target_ranks(scores, rows, items, NONE, NONE, candidates=drawn)
    law = hypergeom(n, before, num)
    assert law.mean() == num * before / n
    assert float(ranks.double().mean()) == pytest.approx(law.mean(), abs=4 * law.std() / num_users**0.5)
    assert float(ranks.double().std()) == pytest.approx(law.std(), rel=0.05)


def test_all_candidates_give_the_full_ranking() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(6, (5, 30), generator=generator).float()
    rows, items = torch.tensor([0, 0, 1, 2, 4]), torch.tensor([4, 9, 0, 29, 13])
    masked = torch.tensor([0, 1, 4]), torch.tensor([1, 7, 2])
    titles = torch.arange(30) // 2
    allowed = torch.ones(5, 30, dtype=torch.bool)
    for row, item in (masked, (rows, items)):
        allowed[row, item] = False
    drawn = SampledCandidates(1000, seed=0).draw(torch.arange(5), allowed)
    full = target_ranks(scores, rows, items, *masked, titles)
    assert torch.equal(target_ranks(scores, rows, items, *masked, titles, drawn), full)
    few = SampledCandidates(3, seed=0).draw(torch.arange(5), allowed)
    without_titles = target_ranks(scores, rows, items, *masked)
    assert (target_ranks(scores, rows, items, *masked, candidates=few) <= without_titles).all()
