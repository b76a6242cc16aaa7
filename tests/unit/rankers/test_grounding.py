"""Grounding: weights of the distances, selection of the exponent on validation, and the report of the texts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest
import torch

from fellrec.data.ragged import Ragged
from fellrec.data.schema import Catalogue
from fellrec.errors import ConfigError
from fellrec.functional.grounding import min_max, weighted_distances
from fellrec.metrics import ClientRankingMetrics
from fellrec.models.backbone import Backbone, load_hf
from fellrec.models.conversion import save_folder
from fellrec.models.module import FellrecModule, OptimizerSettings, ReportingRanker
from fellrec.models.objectives.generative import GenerativeObjective
from fellrec.models.settings import GenerativeSettings, TinySettings
from fellrec.models.split import SplitModel
from fellrec.models.tiny import build_tiny
from fellrec.rankers.grounding import GroundingRanker
from fellrec.rankers.reference import PopularityRanker
from fellrec.rankers.report import REPORTED, generation_figures, report_texts
from fellrec.rankers.settings import GroundingSettings

TITLES = ("Alien", "Heat (1995)", "Up", "Toy Story")
CATALOGUE = Catalogue(tuple("abcd"), TITLES, pd.DataFrame(index=range(4)))
TRAIN = Ragged.from_rows([[0, 1], [2, 1], [1, 3, 2], [2]])
NONE = torch.empty(0, dtype=torch.long)


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return build_tiny(TITLES, TinySettings(hidden_size=16, num_layers=2, vocab_size=300))


@pytest.fixture(scope="module")
def model(tiny: Backbone) -> SplitModel:
    return SplitModel(tiny.model, 1, 1).eval()


def ranker_of(tiny: Backbone, texts: Sequence[str] = (), **settings: object) -> GroundingRanker:
    """A ranker; ``texts`` replace the texts that the model generates."""
    objective = GenerativeObjective(tiny.tokenizer, CATALOGUE, max_history=3, settings=GenerativeSettings())
    ranker = GroundingRanker(objective, GroundingSettings(max_new_tokens=4, **settings), TRAIN)  # type: ignore[arg-type]
    if texts:
        ranker.generate = lambda model, histories: list(texts)  # type: ignore[method-assign]
    return ranker


def test_weighted_distances_by_hand_for_three_items() -> None:
    """D = (2, 3, 4), P = (0, 5, 10): D̂ = P̂ = (0, ½, 1), so D̂ / (1 + P̂)² = (0, ½ · 4/9, 1/4)."""
    found = weighted_distances(torch.tensor([[2.0, 3.0, 4.0]]), torch.tensor([[0.0, 5.0, 10.0]]), [2.0, 0.0])
    torch.testing.assert_close(found, torch.tensor([[[0, 2 / 9, 1 / 4]], [[0, 1 / 2, 1]]]))
    found = weighted_distances(torch.tensor([[2.0, 3.0, 4.0]]), torch.tensor([[10.0, 0.0, 10.0]]), [1.0])
    torch.testing.assert_close(found, torch.tensor([[[0, 1 / 2, 1 / 2]]]))
    assert min_max(torch.full((2, 3), 7.0)).tolist() == [[0.0] * 3] * 2, "no division by zero"


@pytest.mark.parametrize("reweight", ["popularity", "collaborative"])
def test_a_gamma_of_0_does_not_change_the_order(tiny: Backbone, model: SplitModel, reweight: str) -> None:
    histories = torch.tensor([[0, -1, -1], [1, 3, -1]])
    plain, weighted = ranker_of(tiny), ranker_of(tiny, reweight=reweight, gamma=[0, 5])
    assert weighted.choices == (0.0, 5.0)
    for ranker in (plain, weighted):
        ranker.refresh(model)
    scores, by_gamma = plain.scores(model, histories), weighted.scores(model, histories)
    assert by_gamma.shape == (2, 2, 4)
    torch.testing.assert_close(by_gamma[0], -min_max(-scores))
    assert torch.equal(by_gamma[0].argsort(stable=True), scores.argsort(stable=True))
    assert not torch.allclose(by_gamma[1], by_gamma[0])


def test_the_weights_are_counts_in_training(tiny: Backbone, model: SplitModel) -> None:
    """The only transition from item 0 is to item 1; items 0, 1, 2, 3 occur 1, 3, 3, 1 times."""
    histories = torch.tensor([[0, -1, -1]])
    distances = torch.tensor([[1.0, 2.0, 2.0, 2.0]])
    popular, followed = (ranker_of(tiny, ["Alien"], reweight=how, gamma=1) for how in ("popularity", "collaborative"))
    for ranker in (popular, followed):
        assert ranker.choices == ()
        prior = ranker._prior.scores(histories)  # type: ignore[union-attr]
        order = weighted_distances(distances, prior, [1])[0, 0]
        assert order[0] == 0
        assert order[1] == pytest.approx(1 / 2)
        ranker.refresh(model)
        assert ranker.scores(model, histories).argmax().item() == 0, "the generated title stays first"
    assert min_max(popular._prior.scores(histories)).tolist() == [[0, 1, 1, 0]]  # type: ignore[union-attr]
    assert min_max(followed._prior.scores(histories))[0, 2] < 0.01  # type: ignore[union-attr]


def test_settings_are_checked(tiny: Backbone) -> None:
    with pytest.raises(ConfigError, match="ranker.reweight=popular is not allowed: none, popularity or collaborative"):
        ranker_of(tiny, reweight="popular")
    for wrong in (-1, [], [0, "x"], float("nan"), [0, float("inf")]):
        with pytest.raises(ConfigError, match="is not allowed: a number of at least 0, or a list"):
            ranker_of(tiny, gamma=wrong)
    assert ranker_of(tiny, gamma=[3, 0, 3]).gammas == (0.0, 3.0)
    assert ranker_of(tiny, gamma=[3, 0]).choices == (), "there is no choice without weights"


def evaluate(module: FellrecModule, stage: str, target: int) -> dict[str, float]:
    batch = {
        "histories": torch.tensor([[1, -1, -1]]), "users": torch.tensor([0]), "clients": torch.tensor([0]),
        "target_rows": torch.tensor([0]), "target_items": torch.tensor([target]),
        "masked_rows": torch.tensor([0]), "masked_items": torch.tensor([1]),
    }  # fmt: skip
    module.ranker.refresh(module.model)
    module.score_batch(batch)
    return dict(module.finish_evaluation(stage, 0).summary)


def test_gamma_is_selected_on_validation_and_not_on_test(tiny: Backbone, model: SplitModel) -> None:
    """The most distant item is the only popular one, and the validation target. The test target is the nearest item.
    Item 1 is masked."""
    ranker = ranker_of(tiny, ["Alien"], reweight="popularity", gamma=[0, 100])
    module = FellrecModule(
        model, {}, ranker.objective, ranker,
        [ClientRankingMetrics(1, (1, 2), None, ranker.reported) for _ in ranker.choices],
        torch.arange(4), OptimizerSettings(), choice_metric="ndcg_at_2",
    )  # fmt: skip
    assert isinstance(ranker, ReportingRanker)
    assert module.chooses_on_validation
    ranker.refresh(model)
    distances = -ranker_scores(ranker, model)
    order = distances[0, 0].argsort().tolist()
    assert order[0] == 0, "the generated title"
    nearest, popular = (item for item in order[1:] if item != 1)
    counts = torch.zeros(4, dtype=torch.long)
    counts[popular] = 1000
    ranker._prior = PopularityRanker(counts.numpy())
    with pytest.raises(ConfigError, match="there was no validation"):
        evaluate(module, "test", nearest)
    module.take_users()
    valid = evaluate(module, "val", popular)
    assert valid["generation/gamma"] == 100
    assert valid["hr_at_2/mean"] == 1
    test = evaluate(module, "test", nearest)
    assert test["generation/gamma"] == 100, "γ = 0 would be better here"
    assert test["hr_at_2/mean"] == 0
    assert evaluate(module, "val", nearest)["generation/gamma"] == 0
    assert evaluate(module, "test", nearest)["hr_at_2/mean"] == 1


@pytest.mark.parametrize(("ranks", "best"), [([[0, 1, 1], [1, 5, 0]], 1), ([[0, 1, 1], [0, 1, 1]], 0)])
def test_a_choice_is_made_by_the_mean_over_clients(
    tiny: Backbone, model: SplitModel, ranks: list[list[int]], best: int
) -> None:
    """Client 0 has two users, client 1 has one. Hits at 1 are 1, 0, 0 and 0, 0, 1: the first choice is as good for
    users, the second is better for clients, 1/4 and 1/2. Of equal choices it is the first."""
    ranker = ranker_of(tiny, reweight="popularity", gamma=[0, 5])
    metrics = [ClientRankingMetrics(3, (1, 2), None, ranker.reported) for _ in ranker.choices]
    module = FellrecModule(
        model, {}, ranker.objective, ranker, metrics, torch.arange(4), OptimizerSettings(), choice_metric="hr_at_1"
    )
    for metric, of_choice in zip(metrics, ranks, strict=True):
        metric.update(torch.arange(3), torch.tensor([0, 0, 1]), torch.tensor(of_choice), torch.arange(3))
    taken = module.take_users()
    module.add_users(taken)
    evaluation = module.finish_evaluation("val", 0)
    assert evaluation.choice == best
    assert evaluation.summary["hr_at_1/mean"] == (0.5 if best else 0.25)
    module.add_users(taken)
    assert module.finish_evaluation("test", 0).choice == best
    assert not len(module.take_users()[0].users), "an evaluation starts without users"


def ranker_scores(ranker: GroundingRanker, model: SplitModel) -> torch.Tensor:
    return ranker.scores(model, torch.tensor([[1, -1, -1]]))


def test_the_batch_size_does_not_change_the_generated_texts(tiny: Backbone, model: SplitModel) -> None:
    histories = torch.tensor([[0, 1, 2], [3, -1, -1], [2, 1, -1]])
    whole = ranker_of(tiny, num_beams=2).generate(model, histories)
    assert ranker_of(tiny, num_beams=2, batch_size=1).generate(model, histories) == whole


def test_metrics_of_texts_do_not_depend_on_batches() -> None:
    """Four of six texts are titles, one is empty, and four are distinct."""
    texts = ["Up", "Alien", "Up", "", "Heat", "Up"]
    whole = report_texts(texts, set(TITLES))
    parts = torch.cat([report_texts(texts[:2], set(TITLES)), report_texts(texts[2:], set(TITLES))])
    assert torch.equal(whole, parts)
    figures = generation_figures(dict(zip(REPORTED, whole.T)))
    assert figures["generation/in_catalogue_rate"] == pytest.approx(4 / 6)
    assert figures["generation/empty_rate"] == pytest.approx(1 / 6)
    assert figures["generation/duplicate_rate"] == pytest.approx(1 - 4 / 6)
    assert report_texts([], set()).shape == (0, 3)


def test_a_title_truncated_as_in_training_counts_as_a_title(tiny: Backbone, model: SplitModel) -> None:
    objective = GenerativeObjective(
        tiny.tokenizer, CATALOGUE, max_history=3, settings=GenerativeSettings(max_title_tokens=2)
    )
    generated = tiny.tokenizer.decode(tiny.tokenizer("Heat (1995)", add_special_tokens=False)["input_ids"][:2]).strip()
    assert generated != "Heat (1995)"
    assert objective.decoded_titles()[1] == generated
    ranker = GroundingRanker(objective, GroundingSettings())
    ranker.generate = lambda model, histories: [generated]  # type: ignore[method-assign]
    ranker.refresh(model)
    scores = ranker.scores(model, torch.tensor([[0, -1, -1]]))
    assert ranker.take_report()[0, 0] == 1
    assert scores[0].argmax().item() == 1
    assert scores[0, 1].item() == pytest.approx(0, abs=1e-4)


def test_a_generation_config_beside_the_weights_changes_nothing(tmp_path: Path) -> None:
    """Folders from the hub have one with settings for chats."""
    tiny = build_tiny(TITLES, TinySettings(hidden_size=16, num_layers=2, vocab_size=300, seed=3))
    with torch.no_grad():  # so that the texts are not empty
        for parameter in tiny.model.parameters():
            parameter.mul_(3)
        tiny.model.get_input_embeddings().weight[:3] = 0
    own = {"do_sample": True, "temperature": 9.0, "top_k": 5, "num_beams": 2, "num_return_sequences": 2}
    penalties = {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_new_tokens": 8, "length_penalty": -3.0}
    for name in ("plain", "chat"):
        (tmp_path / name).mkdir()
        save_folder(tiny.model, tiny.tokenizer, tmp_path / name)
    (tmp_path / "chat" / "generation_config.json").write_text(json.dumps(own | penalties))
    texts, scores, histories = [], [], torch.tensor([[0, 1, 3], [2, -1, -1]])
    for name in ("plain", "chat"):
        loaded = load_hf(str(tmp_path / name))
        split, ranker = SplitModel(loaded.model, 1, 1).eval(), ranker_of(loaded)
        ranker.refresh(split)
        texts.append(ranker.generate(split, histories))
        scores.append(ranker.scores(split, histories))
    assert all(texts[0])
    assert texts[0] == texts[1]
    assert torch.equal(*scores)
