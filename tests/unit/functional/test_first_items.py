"""The first items of a ranking give the metrics of ``target_ranks``, with ties, masks and duplicate titles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fellrec.functional.first_items import FirstItems, first_items
from fellrec.functional.ranking import ranking_metrics, target_ranks

NUM_ROWS, NUM_ITEMS = 60, 40
Problem = tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def problem(num_levels: int, seed: int = 0) -> Problem:
    """Scores with the given number of levels (few levels give many ties), one to three targets and five masked items."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-num_levels, num_levels, (NUM_ROWS, NUM_ITEMS), generator=generator) / 8
    chosen = torch.rand(NUM_ROWS, NUM_ITEMS, generator=generator).argsort(dim=1)
    rows = torch.arange(NUM_ROWS)
    num_targets = torch.randint(1, 4, (NUM_ROWS,), generator=generator)
    is_target = torch.arange(3) < num_targets[:, None]
    targets = rows.repeat_interleave(num_targets), chosen[:, :3][is_target]
    return scores, targets, (rows.repeat_interleave(5), chosen[:, 2:7].flatten())


def ranks_in(found: FirstItems, targets: tuple[Tensor, Tensor]) -> Tensor:
    """Position of each target in its row's list; ``NUM_ITEMS`` if it is not in the list."""
    rows, items = targets
    is_here = found.items[rows] == items[:, None]
    return torch.where(is_here.any(dim=1), is_here.int().argmax(dim=1), NUM_ITEMS)


@pytest.mark.parametrize(
    "titles", [None, torch.arange(NUM_ITEMS) // 3], ids=["distinct_titles", "three_items_per_title"]
)
@pytest.mark.parametrize("num_levels", [2, 5, 100_000], ids=["many_ties", "ties", "no_ties"])
def test_metrics_of_the_list_are_those_of_the_ranks(num_levels: int, titles: Tensor | None) -> None:
    scores, targets, masked = problem(num_levels)
    ranks = target_ranks(scores, *targets, *masked, titles)
    found = first_items(scores, targets, masked, titles, 10)
    expected = ranking_metrics(ranks, targets[0], NUM_ROWS, (3, 10))
    for name, values in ranking_metrics(ranks_in(found, targets), targets[0], NUM_ROWS, (3, 10)).items():
        assert torch.equal(values, expected[name]), name
    assert (found.scores[:, 1:] <= found.scores[:, :-1]).all()
    assert all(len(row.unique()) == 10 for row in found.items)


def test_without_ties_and_titles_it_is_the_sorted_list() -> None:
    scores, targets, masked = problem(2**20)
    scores[0, 0], scores[1, 1], scores[2, 2] = 0.0, torch.inf, -torch.inf
    left = scores.clone()
    left[masked] = -torch.inf
    left[targets] = scores[targets]
    found = first_items(scores, targets, masked, None, 12)
    expected = left.sort(dim=1, descending=True)
    assert torch.equal(found.items, expected.indices[:, :12])
    assert torch.equal(found.scores, expected.values[:, :12])


def test_a_row_is_tied_if_a_target_and_another_item_have_the_same_score() -> None:
    scores, targets, masked = problem(40)
    expected = []
    for row in range(NUM_ROWS):
        own = set(targets[1][targets[0] == row].tolist())
        others = set(range(NUM_ITEMS)) - own - set(masked[1][masked[0] == row].tolist())
        expected.append(any(scores[row, a] == scores[row, b] for a in own for b in others))
    assert 5 < sum(expected) < NUM_ROWS - 5
    assert first_items(scores, targets, masked, None, 5).is_tied.tolist() == expected


def test_positive_and_negative_zero_are_tied() -> None:
    none = torch.empty(0, dtype=torch.int64)
    scores = torch.tensor([[0.0, -0.0, 1.0]])
    found = first_items(scores, (torch.tensor([0]), torch.tensor([0])), (none, none), None, 3)
    assert (found.items.tolist(), found.is_tied.tolist()) == ([[2, 1, 0]], [True])


def test_rows_with_fewer_items_are_padded() -> None:
    scores = torch.tensor([[0.5, 0.25, 0.75, 1.0]])
    masked = torch.tensor([0, 0]), torch.tensor([1, 3])
    found = first_items(scores, (torch.tensor([0]), torch.tensor([3])), masked, None, 4)
    assert found.items.tolist() == [[3, 2, 0, -1]], "a target is never masked"
    assert found.scores.tolist() == [[1.0, 0.75, 0.5, -torch.inf]]
