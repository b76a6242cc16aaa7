"""The likelihood of titles, read as a tree, one by one or by a beam search, against a pass of each title, for every causal architecture."""

from __future__ import annotations

import copy

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from fellrec.data.schema import Catalogue
from fellrec.data.text import pad_left
from fellrec.models.objectives.generative import GenerativeObjective
from fellrec.models.settings import GenerativeSettings
from fellrec.models.split import SplitModel
from fellrec.models.tiny import build_tokenizer
from fellrec.rankers.constrained import ConstrainedRanker
from fellrec.rankers.likelihood import LikelihoodRanker
from fellrec.rankers.settings import ConstrainedSettings, LikelihoodSettings
from tests.small_models import CONFIGS

TITLES = ("Alien", "Aliens", "Alien", "Heat (1995)", "Heat", "The Lonely Silver Garden", "The Lonely Silver Gate", "M")
CATALOGUE = Catalogue(tuple(map(str, range(8))), TITLES, pd.DataFrame(index=range(8)))
HISTORIES = torch.tensor([[0, 1, 3], [4, -1, -1], [6, 3, -1]])


@pytest.fixture(scope="module")
def objective() -> GenerativeObjective:
    tokenizer = build_tokenizer(TITLES, vocab_size=320)
    return GenerativeObjective(tokenizer, CATALOGUE, max_history=3, settings=GenerativeSettings())


@torch.no_grad()
def one_by_one(model: SplitModel, objective: GenerativeObjective) -> torch.Tensor:
    """The log-likelihood of each title, ``[B, I]``: prompt and title in one pass, without padding or a cache."""
    ids, lengths = objective.prompts(HISTORIES)
    found = []
    for prompt, length in zip(ids, lengths, strict=True):
        for tokens, inside in zip(objective.titles.tokens, objective.titles.inside, strict=True):
            text, title = prompt[:length], tokens[inside]
            logits = model.model(torch.cat([text, title])[None], use_cache=False).logits[0]
            logp = logits.float().log_softmax(dim=-1)[length - 1 : -1]
            found.append(logp.gather(1, title[:, None]).sum())
    return torch.stack(found).view(len(HISTORIES), len(TITLES))


def random_model(name: str, objective: GenerativeObjective) -> SplitModel:
    """With large weights, so that titles differ in likelihood; windows of attention are shorter than any prompt."""
    config = copy.deepcopy(CONFIGS[name])
    config.vocab_size, config.max_position_embeddings = len(objective.tokenizer), 256
    torch.manual_seed(0)
    model = SplitModel(AutoModelForCausalLM.from_config(config).eval(), 1, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    return model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_those_of_each_title_alone(name: str, attention: str, objective: GenerativeObjective) -> None:
    model = random_model(name, objective)
    model.use_attention(attention)
    expected = one_by_one(model, objective)
    assert expected.std() > 0.1
    for tokens in (1, 100_000):  # titles one by one or together, users one by one or together
        scores = LikelihoodRanker(objective, LikelihoodSettings("sum", max_batch_tokens=tokens)).scores(
            model, HISTORIES
        )
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_constrained_search_finds_the_likelihood_of_each_title_alone(
    name: str, objective: GenerativeObjective
) -> None:
    """The cache follows the beams: a user's rows become more, fewer and others."""
    model = random_model(name, objective)
    expected = one_by_one(model, objective)
    for num_beams in (2, 3, 7):  # there are 7 different titles
        ranker = ConstrainedRanker(objective, ConstrainedSettings(num_beams))
        scores = ranker.scores(model, HISTORIES)
        is_reached = scores > scores.amin(dim=1, keepdim=True) if num_beams < 7 else torch.ones_like(scores).bool()
        torch.testing.assert_close(scores[is_reached], expected[is_reached], rtol=1e-4, atol=1e-3)
        certain = ranker.take_report()[:, ranker.reported.index("num_certain")]
        for found, exact, count in zip(scores, expected, certain.long().tolist(), strict=True):
            best, first = (sorted(set(map(float, x.round(decimals=2))), reverse=True)[:count] for x in (found, exact))
            assert best == pytest.approx(first, abs=0.03)
    assert certain.tolist() == [7] * len(HISTORIES)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_a_cache_writes_what_it_writes_without_one(
    name: str, num_beams: int, objective: GenerativeObjective
) -> None:
    """As `GroundingRanker` generates. Prompts and texts are longer than the windows of attention."""
    model = random_model(name, objective)
    ids, mask = pad_left(*objective.prompts(HISTORIES))
    how = {"max_new_tokens": 9, "num_beams": num_beams, "do_sample": False, "pad_token_id": 0, "eos_token_id": 2}
    written = model.model.generate(input_ids=ids, attention_mask=mask, **model.cache_argument(model.new_cache()), **how)
    assert torch.equal(written, model.model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **how))


def test_a_tree_reads_what_titles_have_in_common_once(objective: GenerativeObjective) -> None:
    ranker = LikelihoodRanker(objective, LikelihoodSettings("sum"))
    inside = objective.titles.inside
    beginnings = {
        tuple(tokens[:length].tolist())
        for tokens, row in zip(objective.titles.tokens, inside, strict=True)
        for length in range(1, int(row.sum()))
    }
    assert sum(len(tree.token) for tree in ranker.trees) == len(beginnings) < int((inside.sum(dim=1) - 1).sum())
