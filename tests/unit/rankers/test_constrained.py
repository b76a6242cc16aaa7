"""Constrained decoding against the likelihood of all titles, and against a beam search over lists."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from fellrec.data.schema import Catalogue
from fellrec.errors import ConfigError
from fellrec.functional.ranking import target_ranks
from fellrec.functional.trie import build_trie, is_among_best
from fellrec.models.backbone import Backbone, load_hf
from fellrec.models.module import ReportingRanker
from fellrec.models.objectives.generative import GenerativeObjective
from fellrec.models.split import SplitModel
from fellrec.models.tiny import build_tiny
from fellrec.rankers.constrained import ConstrainedRanker
from fellrec.rankers.likelihood import LikelihoodRanker

TITLES = (
    *("Alien", "Aliens", "Heat (1995)", "Heat", "The Lonely Silver Garden", "The Lonely Silver Gate", "M", "Up"),
    *("Toy Story", "Toy Story 2", "Heat", "The Lonely"),
)
"""Titles that are prefixes of others, and two items with the same title."""
CATALOGUE = Catalogue(tuple(map(str, range(12))), TITLES, pd.DataFrame(index=range(12)))
HISTORIES = torch.tensor([[0, 1, 2], [4, -1, -1], [6, 3, -1], [8, 9, 10], [11, -1, -1]])
TARGETS = torch.arange(5), torch.tensor([3, 5, 7, 4, 1])
NONE = torch.empty(0, dtype=torch.long)


@pytest.fixture(scope="module", params=["tiny", "stories"])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """One with random weights, scaled so that titles differ in likelihood, and a pretrained one."""
    if request.param == "stories":
        return load_hf(str(request.getfixturevalue("real_data") / "stories260K-hf"))
    tiny = build_tiny(TITLES, hidden_size=16, num_layers=2, vocab_size=300)
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.mul_(3)
    return tiny


@pytest.fixture(scope="module")
def model(backbone: Backbone) -> SplitModel:
    return SplitModel(backbone.model, 1, 1).eval()


@pytest.fixture(scope="module")
def objective(backbone: Backbone) -> GenerativeObjective:
    return GenerativeObjective(backbone.tokenizer, CATALOGUE, max_history=3)


@pytest.fixture(scope="module")
def exact(model: SplitModel, objective: GenerativeObjective) -> torch.Tensor:
    return LikelihoodRanker(objective, "sum").scores(model, HISTORIES)


def figures_of(ranker: ConstrainedRanker) -> dict[str, float]:
    return ranker.figures(dict(zip(ranker.reported, ranker.take_report().T)), 0)


@pytest.mark.parametrize(("num_beams", "max_batch_tokens"), [(11, 65536), (1000, 65536), (11, 1)])
def test_enough_beams_give_the_ranking_by_likelihood(
    model: SplitModel, objective: GenerativeObjective, exact: torch.Tensor, num_beams: int, max_batch_tokens: int
) -> None:
    """There are 11 distinct titles."""
    ranker = ConstrainedRanker(objective, num_beams, max_batch_tokens)
    assert isinstance(ranker, ReportingRanker)
    scores = ranker.scores(model, HISTORIES)
    torch.testing.assert_close(scores, exact, rtol=1e-5, atol=1e-4)
    assert torch.equal(scores[:, 3], scores[:, 10]), "two items with the same title"
    groups = torch.from_numpy(CATALOGUE.title_groups)
    ranks = [target_ranks(s, *TARGETS, NONE, NONE, groups) for s in (scores, exact)]
    assert torch.equal(*ranks)
    figures = figures_of(ranker)
    assert figures["generation/exhaustive_rate"] == 1
    assert figures["generation/certain_titles"] == 11
    assert figures["generation/in_catalogue_rate"] == 1


def breadth_first(objective: GenerativeObjective, exact: torch.Tensor, logp_of: dict, num_beams: int) -> set[int]:
    """Items that a beam search over lists reaches, from the log-likelihood of every prefix."""
    rows = [tuple(t[i].tolist()) for t, i in zip(objective.titles.tokens, objective.titles.inside)]
    beams, reached = [()], set()
    while beams:
        longer = {row[: len(beam) + 1] for beam in beams for row in rows if row[: len(beam)] == beam and row != beam}
        reached |= {item for item, row in enumerate(rows) if row in longer}
        open_ = [beam for beam in longer if any(row[: len(beam)] == beam and row != beam for row in rows)]
        beams = sorted(open_, key=lambda beam: -logp_of[beam])[:num_beams]
    return reached


@pytest.mark.parametrize("num_beams", [1, 2, 4])
def test_few_beams_reach_the_titles_of_a_beam_search_over_lists(
    backbone: Backbone, model: SplitModel, objective: GenerativeObjective, exact: torch.Tensor, num_beams: int
) -> None:
    ranker = ConstrainedRanker(objective, num_beams)
    scores = ranker.scores(model, HISTORIES)
    report = dict(zip(ranker.reported, ranker.take_report().T))
    for row in range(len(HISTORIES)):
        ids, lengths = objective.prompts(HISTORIES[row : row + 1])
        prompt = ids[0, : lengths[0]].tolist()
        logp_of = {}
        for tokens, inside in zip(objective.titles.tokens, objective.titles.inside):
            title = tokens[inside].tolist()
            with torch.no_grad():
                logits = backbone.model(torch.tensor([prompt + title]), use_cache=False).logits[0]
            steps = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(title)[:, None])[:, 0]
            logp_of |= {tuple(title[: n + 1]): float(steps[: n + 1].sum()) for n in range(len(title))}
        reached = breadth_first(objective, exact[row], logp_of, num_beams)
        others = sorted(set(range(12)) - reached)
        found = sorted(reached)
        torch.testing.assert_close(scores[row, found], exact[row, found], rtol=1e-5, atol=1e-4)
        assert scores[row, others].unique().numel() <= 1, "all tied"
        assert not others or scores[row, others].max() < scores[row, found].min()
        certain = int(report["num_certain"][row])
        distinct = exact[row].round(decimals=3).unique().flip(0)
        titles = scores[row].round(decimals=3).unique().flip(0)
        torch.testing.assert_close(titles[:certain], distinct[:certain], rtol=0, atol=2e-3)
        assert bool(report["is_exhaustive"][row]) == (certain == 11)
    assert figures_of(ranker)["generation/exhaustive_rate"] < 1


def test_a_target_that_is_not_reached_has_the_last_rank(model: SplitModel, objective: GenerativeObjective) -> None:
    scores = ConstrainedRanker(objective, num_beams=1).scores(model, HISTORIES)
    missed = (scores == scores.amin(dim=1, keepdim=True)).nonzero()
    rows, items = missed[:, 0], missed[:, 1]
    for row, item in zip(rows.tolist(), items.tolist()):
        rank = target_ranks(scores[row : row + 1], torch.tensor([0]), torch.tensor([item]), NONE, NONE)
        assert rank.item() == 11, "the last of 12"


def test_titles_that_are_equal_after_truncation_have_the_same_score(backbone: Backbone, model: SplitModel) -> None:
    objective = GenerativeObjective(backbone.tokenizer, CATALOGUE, max_history=3, max_title_tokens=3)
    ranker = ConstrainedRanker(objective, num_beams=12)
    scores = ranker.scores(model, HISTORIES)
    torch.testing.assert_close(
        scores, LikelihoodRanker(objective, "sum").scores(model, HISTORIES), rtol=1e-5, atol=1e-4
    )
    assert ranker.trie.num_ends < 11
    assert torch.equal(scores[:, 4], scores[:, 5])


def test_settings_are_checked(objective: GenerativeObjective) -> None:
    with pytest.raises(ConfigError, match="ranker.num_beams=0 must be an integer of at least 1"):
        ConstrainedRanker(objective, num_beams=0)
    with pytest.raises(ConfigError, match="ranker.max_batch_tokens=0 must be an integer of at least 1"):
        ConstrainedRanker(objective, max_batch_tokens=0)


def test_a_trie_has_one_node_per_distinct_prefix() -> None:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 4, (60, 6), generator=generator)
    lengths = torch.randint(1, 7, (60,), generator=generator)
    inside = torch.arange(6) < lengths[:, None]
    trie = build_trie(tokens, inside)
    rows = [tuple(t[i].tolist()) for t, i in zip(tokens, inside)]
    assert len(trie.token) == len({row[:n] for row in rows for n in range(len(row) + 1)})
    assert trie.num_ends == len(set(rows))
    for row, end in zip(rows, trie.end_of_row.tolist()):
        node = torch.tensor([0])
        for n, token in enumerate(row):
            _, children = trie.children(node)
            assert set(trie.token[children].tolist()) == {r[n] for r in rows if len(r) > n and r[:n] == row[:n]}
            node = children[trie.token[children] == token]
        assert trie.end[node].item() == end
    for node, only in enumerate(trie.only_end.tolist()):
        through = {
            end for row, path, end in zip(rows, trie.path, trie.end_of_row.tolist()) if node in path[1 : len(row)]
        }
        through |= {end for end in [trie.end[node].item()] if end >= 0}
        assert only == (through.pop() if len(through) == 1 else -1)


def test_a_trie_has_the_path_of_each_row_from_its_root() -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 4, (40, 5), generator=generator)
    inside = torch.arange(5) < torch.randint(1, 6, (40,), generator=generator)[:, None]
    roots = torch.arange(40) % 2
    trie = build_trie(tokens, inside, roots)
    rows = [(root, *t[i].tolist()) for root, t, i in zip(roots.tolist(), tokens, inside)]
    assert len(trie.token) == len({row[:n] for row in rows for n in range(1, len(row) + 1)})
    values = torch.rand(7, generator=generator).expand(1, 7)
    for row, (path, places) in enumerate(zip(trie.path, trie.place)):
        assert path[0] == roots[row]
        for n, token in enumerate(rows[row][1:]):
            _, children = trie.children(path[n : n + 1])
            assert trie.token[children[places[n]]] == token
            of_children, is_child = trie.of_children(values, path[n : n + 1])
            assert is_child.all()
            assert torch.equal(of_children[0], values[0, trie.token[children]])
        assert trie.end[children[places[n]]] == trie.end_of_row[row]
    of_children, is_child = trie.of_children(values.expand(len(trie.token), 7), torch.arange(len(trie.token)))
    assert torch.equal(is_child.sum(dim=1), trie.num_children)
    _, children = trie.children(torch.arange(len(trie.token)))
    assert torch.equal(of_children[is_child], values[0, trie.token[children]])


def test_the_best_of_each_group_equal_those_of_pandas_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    values, groups = torch.rand(200, generator=generator), torch.randint(0, 7, (200,), generator=generator)
    frame = pd.DataFrame({"value": values.numpy(), "group": groups.numpy()})
    expected = frame.groupby("group")["value"].rank(ascending=False) <= 5
    assert is_among_best(values, groups, 5).tolist() == expected.tolist()
    assert is_among_best(torch.empty(0), NONE, 5).tolist() == []
