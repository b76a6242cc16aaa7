"""Several targets per row and the softmax over the catalogue, against slow implementations with lists."""

from __future__ import annotations

from itertools import permutations

import pandas as pd
import pytest
import torch

from fellrec.data.prompts import prompt_template
from fellrec.data.schema import Catalogue
from fellrec.distributed.batch_sharing import take_rows
from fellrec.errors import ConfigError
from fellrec.models.backbone import Backbone
from fellrec.models.objectives.generative import GenerativeObjective
from fellrec.models.split import SplitModel
from fellrec.models.tiny import build_tiny
from fellrec.rankers.constrained import ConstrainedRanker
from fellrec.rankers.grounding import GroundingRanker
from fellrec.rankers.likelihood import LikelihoodRanker

TITLES = ("Alien", "Aliens", "Heat (1995)", "Heat", "The Lonely Garden", "The Lonely Gate", "Up", "Heat", "- Alien")
"""Titles that are prefixes of others, two items with the same title, and one that looks like a history line."""
CATALOGUE = Catalogue(tuple("abcdefghi"), TITLES, pd.DataFrame(index=range(9)))
ITEMS = torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1], [6, 3, 1, 8]])
IS_TARGET = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]]).bool()
ROWS = (([0, 1, 2, 3], {1, 2, 3}), ([4, 5], {1}), ([6, 3, 1], {1, 2}))
"""The same as lists: items up to the last target, and the positions of the targets."""
DISTINCT = [0, 1, 2, 3, 4, 5, 6, 8]
TEMPLATE = prompt_template("product-1")


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    """Random weights, scaled so that tokens differ in likelihood."""
    backbone = build_tiny([f"{title}\n" for title in TITLES], hidden_size=16, num_layers=2, vocab_size=300)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.mul_(3)
    return backbone


@pytest.fixture(scope="module")
def model(tiny: Backbone) -> SplitModel:
    return SplitModel(tiny.model, 1, 1).eval()


def objective_of(tiny: Backbone, softmax: str, one_target_per_row: bool = False) -> GenerativeObjective:
    return GenerativeObjective(
        tiny.tokenizer, CATALOGUE, max_history=3, one_target_per_row=one_target_per_row, softmax=softmax
    )


def pieces_of(tiny: Backbone, items: list[int]) -> list[tuple[int | None, list[int]]]:
    """A prompt with its answer: parts of token ids with the position of their item in the row."""

    def ids(text: str) -> list[int]:
        return tiny.tokenizer(text, add_special_tokens=False)["input_ids"]

    pieces: list[tuple[int | None, list[int]]] = [(None, [tiny.tokenizer.bos_token_id, *ids(TEMPLATE.before)])]
    pieces += [(place, ids(f"- {TITLES[item]}\n")) for place, item in enumerate(items[:-1])]
    pieces.append((None, ids(TEMPLATE.after)))
    return [*pieces, (len(items) - 1, [*ids(TITLES[items[-1]]), tiny.tokenizer.eos_token_id])]


def slow_loss(tiny: Backbone, softmax: str, rows: tuple[tuple[list[int], set[int]], ...]) -> tuple[float, int]:
    """A loop over rows and tokens."""
    total, count = 0.0, 0
    answers = [pieces_of(tiny, [0, item])[-1][1] for item in range(len(TITLES))]
    lines = [pieces_of(tiny, [item, 0])[1][1] for item in range(len(TITLES))]
    for items, targets in rows:
        pieces = pieces_of(tiny, items)
        whole = [token for _, ids in pieces for token in ids]
        with torch.no_grad():
            logits = tiny.model(torch.tensor([whole]), use_cache=False).logits[0]
        begin = 0
        for place, ids in pieces:
            for n, token in enumerate(ids if place in targets else []):
                texts = answers if place == len(items) - 1 else lines
                allowed = sorted({text[n] for text in texts if text[:n] == ids[:n] and len(text) > n})
                if softmax == "vocabulary":
                    allowed = list(range(logits.shape[1]))
                elif len(allowed) == 1:
                    continue
                step = logits[begin + n - 1, allowed].double().log_softmax(dim=0)
                total, count = total - float(step[allowed.index(token)]), count + 1
            begin += len(ids)
    return total, count


@pytest.mark.parametrize("softmax", ["vocabulary", "catalogue"])
def test_each_title_of_a_row_is_a_target(tiny: Backbone, model: SplitModel, softmax: str) -> None:
    """Items after the last target are not in the prompt."""
    objective = objective_of(tiny, softmax)
    assert not objective.one_target_per_row
    batch = objective.collate(ITEMS, IS_TARGET)
    assert tiny.tokenizer.decode(batch["input_ids"][2]).count("Alien") == 1, "the fourth item is after the last target"
    total, count = objective.loss(model, batch)
    expected, number = slow_loss(tiny, softmax, ROWS)
    assert count == number == len(batch["targets"])
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)
    assert objective.lengths(ITEMS, IS_TARGET).tolist() == batch["lengths"].tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("softmax", ["vocabulary", "catalogue"])
def test_with_one_target_per_row_only_the_last_title_is_a_target(
    tiny: Backbone, model: SplitModel, softmax: str
) -> None:
    is_last = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]).bool()
    total, count = (objective := objective_of(tiny, softmax, True)).loss(model, objective.collate(ITEMS, is_last))
    expected, number = slow_loss(tiny, softmax, tuple((items, {len(items) - 1}) for items, _ in ROWS))
    assert (count, float(total.detach())) == (number, pytest.approx(expected, rel=1e-5))


def test_dropped_titles_are_not_targets(tiny: Backbone, model: SplitModel) -> None:
    objective = objective_of(tiny, "catalogue")
    objective._room = int(objective.lines.lengths[[1, 2]].sum())
    total, count = objective.loss(model, objective.collate(ITEMS[:1], IS_TARGET[:1]))
    expected, number = slow_loss(tiny, "catalogue", (([1, 2, 3], {0, 1, 2}),))
    assert (count, float(total.detach())) == (number, pytest.approx(expected, rel=1e-5))


def test_the_likelihoods_of_all_titles_sum_to_one_and_equal_those_of_the_loss(
    tiny: Backbone, model: SplitModel
) -> None:
    """With the softmax over the vocabulary, other texts have a part of the probability."""
    histories = torch.tensor([[0, 1, 2], [4, -1, -1], [6, 3, -1]])
    sums = {}
    for softmax in ("catalogue", "vocabulary"):
        objective = objective_of(tiny, softmax)
        scores = ConstrainedRanker(objective, num_beams=20).scores(model, histories)
        sums[softmax] = scores[:, DISTINCT].exp().sum(dim=1)
        assert torch.equal(scores[:, 3], scores[:, 7]), "two items with the same title"
        for row, (history, target) in enumerate((([0, 1, 2], 3), ([4], 5), ([6, 3], 1))):
            expected, _ = slow_loss(tiny, softmax, (([*history, target], {len(history)}),))
            assert float(scores[row, target]) == pytest.approx(-expected, rel=1e-4)
    torch.testing.assert_close(sums["catalogue"], torch.ones(3))
    assert sums["vocabulary"].max() < 0.9


@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_a_title_is_complete_as_soon_as_its_prefix_is_unique(tiny: Backbone, model: SplitModel, num_beams: int) -> None:
    """The search needs fewer steps, with exact likelihoods, and the titles reported as certain have exact ranks."""
    histories = torch.tensor([[0, 1, 2], [4, -1, -1], [6, 3, -1]])
    objective = objective_of(tiny, "catalogue")
    exact = ConstrainedRanker(objective, num_beams=20).scores(model, histories)
    ranker = ConstrainedRanker(objective, num_beams)
    steps: list[int] = []
    forward = model.model.forward

    def watched(*args: object, **kwargs: object) -> object:
        steps.append(1)
        return forward(*args, **kwargs)

    model.model.forward = watched  # type: ignore[method-assign, assignment]
    try:
        scores = ranker.scores(model, histories)
    finally:
        model.model.forward = forward  # type: ignore[method-assign]
    answers = {tuple(pieces_of(tiny, [0, item])[-1][1]) for item in range(len(TITLES))}
    common = [n for one, other in permutations(answers, 2) for n in range(len(one)) if one[:n] == other[:n]]
    assert len(steps) <= max(common) + 1 < max(map(len, answers))
    certain = ranker.take_report()[:, ranker.reported.index("num_certain")]
    for row in range(3):
        found = scores[row] > scores[row].min()
        torch.testing.assert_close(scores[row, found], exact[row, found], rtol=1e-4, atol=1e-4)
        best, first = (
            values[row, DISTINCT].sort(descending=True).values[: int(certain[row])] for values in (exact, scores)
        )
        torch.testing.assert_close(first, best, rtol=1e-4, atol=1e-4)


def test_only_tokens_that_continue_a_title_have_gradients(tiny: Backbone, model: SplitModel) -> None:
    """The loss does not depend on the logits of other tokens."""
    objective = objective_of(tiny, "catalogue")
    batch = objective.collate(ITEMS, IS_TARGET)
    hidden = model(batch["input_ids"]).detach()
    lm_head = model.lm_head
    used: list[torch.Tensor] = []

    def watched(values: torch.Tensor) -> torch.Tensor:
        used.append(lm_head(values).detach().requires_grad_())
        return used[0]

    model.lm_head = watched  # type: ignore[assignment]
    try:
        objective.loss_of(model, [hidden], batch)[0].backward()
    finally:
        model.lm_head = lm_head
    gradient = used[0].grad
    assert gradient is not None
    torch.testing.assert_close(gradient.sum(dim=1), torch.zeros(len(gradient)), rtol=0, atol=1e-5)
    counts = [int((row != 0).sum()) for row in gradient]
    assert set(counts) <= set(range(2, len(TITLES) + 1)), "at most one token per title"
    assert max(counts) >= 4


def test_the_loss_of_a_batch_is_the_sum_of_its_parts(tiny: Backbone, model: SplitModel) -> None:
    objective = objective_of(tiny, "catalogue")
    batch = objective.collate(ITEMS, IS_TARGET)
    whole, count = objective.loss(model, batch)
    parts = [objective.loss(model, take_rows(batch, rows)) for rows in (torch.tensor([0, 2]), torch.tensor([1]))]
    assert sum(number for _, number in parts) == count
    torch.testing.assert_close(torch.stack([total for total, _ in parts]).sum(), whole)


def test_settings_are_checked(tiny: Backbone) -> None:
    with pytest.raises(ConfigError, match="unknown objective.softmax 'catalog'.* catalogue"):
        objective_of(tiny, "catalog")
    same = Catalogue(("a", "b"), ("Heat", "Heat"), pd.DataFrame(index=range(2)))
    with pytest.raises(ConfigError, match="softmax=catalogue needs at least two different titles"):
        GenerativeObjective(tiny.tokenizer, same, softmax="catalogue")
    for ranker, make in (("grounding", GroundingRanker), ("likelihood", LikelihoodRanker)):
        with pytest.raises(ConfigError, match=f"ranker={ranker} .* choose ranker=constrained"):
            make(objective_of(tiny, "catalogue"))
        make(objective_of(tiny, "vocabulary"))
