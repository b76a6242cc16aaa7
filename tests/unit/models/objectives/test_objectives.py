"""Both objectives and all rankers against slow reference implementations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch

from fellrec.data.prompts import TEMPLATES, PromptTemplate, prompt_template
from fellrec.data.schema import Catalogue
from fellrec.errors import BackboneError, ConfigError
from fellrec.models.adapters import LoraAdapter
from fellrec.models.backbone import Backbone, load_hf
from fellrec.models.objectives.generative import GenerativeObjective
from fellrec.models.objectives.retrieval import RetrievalObjective
from fellrec.models.split import SplitModel
from fellrec.models.tiny import build_tiny
from fellrec.rankers.constrained import ConstrainedRanker
from fellrec.rankers.grounding import GroundingRanker
from fellrec.rankers.likelihood import LikelihoodRanker
from fellrec.rankers.similarity import SimilarityRanker

TITLES = ("Alien", "Heat (1995)", "Amélie", "The Lonely Silver Garden", "M", "Up", "Toy Story")
GENRES = ["Horror", "Crime", "Romance", "Drama", "Thriller", "Animation", "Animation"]
CATALOGUE = Catalogue(tuple("abcdefg"), TITLES, pd.DataFrame({"genre": GENRES}))
ITEMS = torch.tensor([[0, 1, 2, 3], [4, 5, -1, -1], [6, 3, 1, -1]])
ALL_TARGETS = torch.tensor([[0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 0]]).bool()
HISTORIES = torch.tensor([[0, 1, 2], [4, -1, -1], [6, 3, -1]])


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return build_tiny([f"{text}\n" for text in CATALOGUE.texts()], hidden_size=16, num_layers=2, vocab_size=320)


@pytest.fixture(scope="module")
def model(tiny: Backbone) -> SplitModel:
    return SplitModel(tiny.model, 1, 1).eval()


def ids_of(backbone: Backbone, text: str) -> list[int]:
    return backbone.tokenizer(text, add_special_tokens=False)["input_ids"]


def slow_query(tiny: Backbone, history: list[int]) -> torch.Tensor:
    ids = [tiny.tokenizer.bos_token_id]
    for item in history:
        ids += ids_of(tiny, TITLES[item] + "\n")
    hidden = tiny.model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
    return hidden / hidden.norm()


def slow_item_vectors(tiny: Backbone) -> torch.Tensor:
    rows = []
    for title, genre in zip(TITLES, GENRES, strict=True):
        mean = tiny.model.get_input_embeddings()(torch.tensor(ids_of(tiny, f"{title} {genre}"))).mean(dim=0)
        rows.append(mean / mean.norm())
    return torch.stack(rows)


def test_retrieval_loss_equals_one_history_at_a_time(tiny: Backbone, model: SplitModel) -> None:
    objective = RetrievalObjective(tiny.tokenizer, CATALOGUE, max_history=3, temperature=0.1)
    total, count = objective.loss(model, objective.collate(ITEMS, ALL_TARGETS))
    expected = torch.zeros(())
    for history, target in (([0], 1), ([0, 1], 2), ([0, 1, 2], 3), ([4], 5), ([6, 3], 1)):
        logits = slow_item_vectors(tiny) @ slow_query(tiny, history) / 0.1
        expected = expected - logits.log_softmax(dim=0)[target]
    assert count == 5
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_similarity_ranker_equals_one_history_at_a_time(tiny: Backbone, model: SplitModel) -> None:
    ranker = SimilarityRanker(RetrievalObjective(tiny.tokenizer, CATALOGUE, max_history=3))
    ranker.refresh(model)
    expected = torch.stack(
        [slow_item_vectors(tiny) @ slow_query(tiny, history) for history in ([0, 1, 2], [4], [6, 3])]
    )
    torch.testing.assert_close(ranker.scores(model, HISTORIES), expected, rtol=1e-5, atol=1e-5)


def test_encoded_item_vectors_are_mean_hidden_states(tiny: Backbone, model: SplitModel) -> None:
    objective = RetrievalObjective(tiny.tokenizer, CATALOGUE, item_encoder="encoded", item_fields=["title"])
    hidden = tiny.model.model(torch.tensor([ids_of(tiny, "Heat (1995)")]), use_cache=False).last_hidden_state[0]
    mean = hidden.mean(dim=0)
    torch.testing.assert_close(objective.item_vectors(model)[1], mean / mean.norm(), rtol=1e-5, atol=1e-5)


def test_retrieval_settings_are_checked(tiny: Backbone, model: SplitModel) -> None:
    with pytest.raises(ConfigError, match=r"unknown objective.item_encoder 'token'; choose from: tokens"):
        RetrievalObjective(tiny.tokenizer, CATALOGUE, item_encoder="token")
    with pytest.raises(ConfigError, match="objective.temperature=0 must be above 0"):
        RetrievalObjective(tiny.tokenizer, CATALOGUE, temperature=0)
    with pytest.raises(ConfigError, match="unknown item field 'brand'"):
        RetrievalObjective(tiny.tokenizer, CATALOGUE, item_fields=["brand"])
    long = RetrievalObjective(tiny.tokenizer, CATALOGUE, max_history=200)
    with pytest.raises(BackboneError, match=r"tokens, but the backbone's context is 512"):
        long.check(model)


GOLDEN_PROMPTS = Path(__file__).with_name("golden_prompts")
TEMPLATE = prompt_template("product-1")


def rendered(template: PromptTemplate, titles: Sequence[str]) -> str:
    """The whole prompt for a history, oldest title first."""
    return "".join([template.before, *(template.line.replace("{title}", title) for title in titles), template.after])


@pytest.mark.parametrize("version", TEMPLATES)
def test_prompts_equal_the_golden_texts_in_training_and_inference(tiny: Backbone, version: str) -> None:
    """The golden texts are written by hand, without the answer."""
    golden = (GOLDEN_PROMPTS / f"{version}.txt").read_text()
    assert rendered(TEMPLATES[version], ["Toy Story", "The Lonely Silver Garden"]) == golden
    objective = GenerativeObjective(tiny.tokenizer, CATALOGUE, max_history=3, template=version)
    assert objective.metadata["prompt_template"] == version
    ids, lengths = objective.prompts(HISTORIES)
    decode = tiny.tokenizer.decode
    assert decode(ids[2, : lengths[2]]) == "<s>" + golden
    batch = objective.collate(ITEMS[2:], ALL_TARGETS[2:])
    assert decode(batch["input_ids"][0]) == "<s>" + golden + "Heat (1995)</s>"
    assert decode(batch["targets"]) == "Heat (1995)</s>"


def test_every_template_has_a_golden_text_and_a_different_hash(tiny: Backbone) -> None:
    assert {path.stem for path in GOLDEN_PROMPTS.iterdir()} == set(TEMPLATES)
    assert len({template.sha256 for template in TEMPLATES.values()}) == len(TEMPLATES)
    changed = dataclasses.replace(TEMPLATE, after="Next thing:\n")
    assert changed.sha256 != TEMPLATE.sha256
    with pytest.raises(ConfigError, match="unknown objective.template 'movies-1'; choose from: movie-1, "):
        GenerativeObjective(tiny.tokenizer, CATALOGUE, template="movies-1")


def test_lengths_equal_those_of_the_batch(tiny: Backbone) -> None:
    last = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]).bool()
    objective = GenerativeObjective(tiny.tokenizer, CATALOGUE, max_history=3)
    assert objective.lengths(ITEMS, last).tolist() == objective.collate(ITEMS, last)["lengths"].tolist()  # type: ignore[union-attr]
    objective._room = int(objective.lines.lengths[[1, 2]].sum())
    assert objective.lengths(ITEMS, last).tolist() == objective.collate(ITEMS, last)["lengths"].tolist()  # type: ignore[union-attr]
    alone = GenerativeObjective(tiny.tokenizer, CATALOGUE, max_history=3, group_by_length=False)
    assert alone.lengths(ITEMS, last) is None


def test_truncation_drops_only_the_oldest_titles(tiny: Backbone) -> None:
    objective = GenerativeObjective(tiny.tokenizer, CATALOGUE, max_history=3)
    lengths = [len(ids_of(tiny, f"- {TITLES[item]}\n")) for item in (1, 2)]
    objective._room = sum(lengths)
    ids, length = objective.prompts(HISTORIES[:1])
    assert tiny.tokenizer.decode(ids[0, : length[0]]) == "<s>" + rendered(TEMPLATE, ["Heat (1995)", "Amélie"])


def test_a_title_longer_than_the_prompt_is_truncated_with_its_line_break(tiny: Backbone) -> None:
    """It is an error if the truncated title does not fit either."""
    title = "A Title Of Many Words " * 40
    catalogue = Catalogue(("a", "b"), (title, "Up"), pd.DataFrame(index=range(2)))
    objective = GenerativeObjective(tiny.tokenizer, catalogue, max_history=2, max_tokens=240, max_title_tokens=12)
    assert len(ids_of(tiny, title)) > objective._room >= 20
    ids, lengths = objective.prompts(torch.tensor([[1, 0], [0, 1]]))
    kept = tiny.tokenizer.decode(ids_of(tiny, f"- {title}")[:19]).removeprefix("- ")
    for row, titles in enumerate((["Up", kept], [kept, "Up"])):
        assert tiny.tokenizer.decode(ids[row, : lengths[row]]) == "<s>" + rendered(TEMPLATE, titles)
    longest = int(objective.lines.lengths.max())
    least = 240 - objective._room + longest
    alone = GenerativeObjective(tiny.tokenizer, catalogue, max_history=2, max_tokens=least, max_title_tokens=12)
    ids, lengths = alone.prompts(torch.tensor([[1, 0]]))
    assert tiny.tokenizer.decode(ids[0, : lengths[0]]) == "<s>" + rendered(TEMPLATE, [kept])
    with pytest.raises(
        ConfigError, match=rf"leaves {longest - 1} tokens for the history .* one title can have {longest}"
    ):
        GenerativeObjective(tiny.tokenizer, catalogue, max_history=2, max_tokens=least - 1, max_title_tokens=12)


def test_generative_loss_scores_the_target_title_only(tiny: Backbone, model: SplitModel) -> None:
    objective = GenerativeObjective(tiny.tokenizer, CATALOGUE, max_history=3)
    last = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]).bool()
    total, count = objective.loss(model, objective.collate(ITEMS, last))
    expected, tokens = torch.zeros(()), 0
    for history, target in (([0, 1, 2], 3), ([4], 5), ([6, 3], 1)):
        logp, number = slow_likelihood(tiny, history, target)
        expected, tokens = expected - logp, tokens + number
    assert count == tokens
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-4)


def slow_likelihood(backbone: Backbone, history: list[int], target: int) -> tuple[torch.Tensor, int]:
    """Log-likelihood of a title with its end token after the prompt, in one forward pass without a cache."""
    prompt = [backbone.tokenizer.bos_token_id, *ids_of(backbone, TEMPLATE.before)]
    for item in history:
        prompt += ids_of(backbone, f"- {TITLES[item]}\n")
    prompt += ids_of(backbone, TEMPLATE.after)
    answer = [*ids_of(backbone, TITLES[target]), backbone.tokenizer.eos_token_id]
    logits = backbone.model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
    logp = logits.log_softmax(dim=-1)
    return sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(answer)), len(answer)  # type: ignore[return-value]


@pytest.mark.parametrize("max_batch_tokens", [1, 400, 100_000])
@pytest.mark.parametrize("normalise", ["mean", "sum"])
def test_likelihood_with_cached_prompts_equals_passes_without_a_cache(
    tiny: Backbone, model: SplitModel, normalise: str, max_batch_tokens: int
) -> None:
    objective = GenerativeObjective(tiny.tokenizer, CATALOGUE, max_history=3)
    ranker = LikelihoodRanker(objective, normalise, max_batch_tokens)
    scores = ranker.scores(model, HISTORIES)
    for row, history in enumerate(([0, 1, 2], [4], [6, 3])):
        for item in range(len(TITLES)):
            with torch.no_grad():
                logp, tokens = slow_likelihood(tiny, history, item)
            expected = logp / tokens if normalise == "mean" else logp
            torch.testing.assert_close(scores[row, item], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def stories(real_data: Path) -> Backbone:
    return load_hf(str(real_data / "stories260K-hf"))


def test_grounding_ranks_the_generated_title_first(stories: Backbone) -> None:
    model = SplitModel(stories.model, 1, 1).eval()
    objective = GenerativeObjective(stories.tokenizer, CATALOGUE, max_history=3)
    ranker = GroundingRanker(objective, max_new_tokens=8)
    ranker.refresh(model)
    vectors = ranker.embed(model, list(TITLES))
    for item, title in enumerate(TITLES):
        ids = [stories.tokenizer.bos_token_id, *ids_of(stories, title)]
        alone = stories.model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(vectors[item], alone, rtol=1e-4, atol=1e-4)
    ranker.generate = lambda model, histories: ["Heat (1995)", "", "Up"]  # type: ignore[method-assign]
    scores = ranker.scores(model, HISTORIES)
    assert scores.argmax(dim=1)[[0, 2]].tolist() == [1, 5]
    figures = ranker.figures(dict(zip(ranker.reported, ranker.take_report().T)), choice=0)
    assert figures == pytest.approx(
        {"generation/in_catalogue_rate": 2 / 3, "generation/empty_rate": 1 / 3, "generation/duplicate_rate": 0}
    )


def test_grounding_embeds_with_the_frozen_backbone(real_data: Path) -> None:
    backbone = load_hf(str(real_data / "stories260K-hf"))
    model = SplitModel(backbone.model, 1, 1).eval()
    objective = GenerativeObjective(backbone.tokenizer, CATALOGUE, max_history=3)
    before = GroundingRanker(objective).embed(model, list(TITLES))
    adapter = LoraAdapter()
    adapter.attach(backbone.model, backbone.arch, 0, lambda name: "body")
    with torch.no_grad():
        for parameter in adapter.trainable(backbone.model).values():
            parameter.add_(0.1)
    ids = torch.arange(3, 9)[None]
    adapted = model.eval()(ids)
    assert torch.equal(GroundingRanker(objective).embed(model, list(TITLES)), before)
    assert torch.equal(model(ids), adapted), "the adapter is active again"


def test_training_on_titles_raises_their_likelihood(real_data: Path) -> None:
    backbone = load_hf(str(real_data / "stories260K-hf"))
    model = SplitModel(backbone.model, 1, 1)
    objective = GenerativeObjective(backbone.tokenizer, CATALOGUE, max_history=3)
    adapter = LoraAdapter(dropout=0.0)
    adapter.attach(backbone.model, backbone.arch, 0, lambda name: "body")
    last = torch.tensor([[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]]).bool()
    batch = objective.collate(ITEMS, last)
    optimizer = torch.optim.AdamW(adapter.trainable(backbone.model).values(), lr=1e-2)
    losses = []
    for _ in range(120):
        total, count = objective.loss(model, batch)
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()) / count)
    assert losses[-1] < 0.7 * losses[0]
    scores = LikelihoodRanker(objective).scores(model.eval(), HISTORIES)
    assert scores.argmax(dim=1).tolist() == [3, 5, 1]
    exact, few = LikelihoodRanker(objective, "sum").scores(model, HISTORIES), ConstrainedRanker(objective, num_beams=3)
    order = few.scores(model, HISTORIES).argsort(dim=1, descending=True)
    certain = few.take_report()[:, few.reported.index("num_certain")].int().tolist()
    assert max(certain) < 7, "not all titles are reached"
    assert min(certain) >= 1, "after training, few beams suffice for the most likely title"
    for row, number in enumerate(certain):
        assert order[row, :number].tolist() == exact[row].argsort(descending=True)[:number].tolist()
