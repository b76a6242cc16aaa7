"""SASRec: one token per item, the forward pass against an independent implementation, and small runs."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fellrec.config.compose import compose
from fellrec.data.schema import Catalogue
from fellrec.errors import ConfigError, DataError
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.experiment.results import reference_results
from fellrec.models.backbone import Backbone
from fellrec.models.objectives.retrieval import RetrievalObjective
from fellrec.models.sasrec import build_sasrec, item_tokenizer
from fellrec.models.settings import RetrievalSettings, SasrecSettings
from fellrec.models.split import SplitModel
from fellrec.rankers.similarity import SimilarityRanker

IDS = ("7", "B00 05", "x\ty", "70", "é", "0007")
CATALOGUE = Catalogue(IDS, ("Heat", "Heat", "Heat", "Up", "M", "Up"), pd.DataFrame({"genre": [""] * 6}))
HISTORIES = torch.tensor([[0, 1, 2, 1], [5, 3, -1, -1], [4, -1, -1, -1]])


@pytest.fixture(scope="module")
def sasrec() -> Backbone:
    """With weights larger than the initial ones, so that every term of the forward pass matters."""
    backbone = build_sasrec(IDS, SasrecSettings(hidden_size=8, num_layers=2, num_heads=2, max_position_embeddings=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return backbone


def objective_of(backbone: Backbone, **settings: object) -> RetrievalObjective:
    fields = {"history_fields": ["item_id"], "item_fields": ["item_id"], "similarity": "dot", "temperature": 1.0}
    return RetrievalObjective(
        backbone.tokenizer, CATALOGUE, max_history=4, settings=RetrievalSettings(**{**fields, **settings})
    )  # type: ignore[arg-type]


def test_every_item_id_is_one_token(sasrec: Backbone) -> None:
    objective = objective_of(sasrec)
    for texts in (objective.history_text, objective.item_text):
        assert texts.tokens.tolist() == [[1], [2], [3], [4], [5], [6]]
    ids, ends = objective._history_tokens(HISTORIES)
    assert ids.tolist() == [[1, 2, 3, 2], [6, 4, 0, 0], [5, 0, 0, 0]]
    assert ends[:, -1].tolist() == [3, 1, 0]


@pytest.mark.parametrize(
    ("ids", "first"), [(("1", "2", " 1"), "'1'"), (("1", "<pad>"), "'<pad>'"), (("1", "a<pad>b"), "'a<pad>b'")]
)
def test_ids_that_are_not_valid_tokens_are_refused(ids: tuple[str, ...], first: str) -> None:
    with pytest.raises(DataError, match=f"1 ids are not valid, first: {first}"):
        item_tokenizer(ids)


def by_hand(weights: dict[str, Tensor], tokens: Tensor, num_heads: int = 2) -> Tensor:
    """Pre-norm causal self-attention and feed-forward blocks, with a loop over heads; ``[L]`` to ``[L, D]``."""

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    hidden = weights["transformer.wte.weight"][tokens] + weights["transformer.wpe.weight"][: len(tokens)]
    for number in range(2):
        layer = f"transformer.h.{number}"
        queries, keys, values = linear(norm(hidden, f"{layer}.ln_1"), f"{layer}.attn.c_attn").chunk(3, dim=-1)
        heads = []
        for q, k, v in zip(*(part.chunk(num_heads, dim=-1) for part in (queries, keys, values)), strict=True):
            scores = (q @ k.T / math.sqrt(q.shape[-1])).masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), -1e9)
            heads.append(scores.softmax(-1) @ v)
        hidden = hidden + linear(torch.cat(heads, dim=-1), f"{layer}.attn.c_proj")
        inner = linear(norm(hidden, f"{layer}.ln_2"), f"{layer}.mlp.c_fc").clamp(min=0)
        hidden = hidden + linear(inner, f"{layer}.mlp.c_proj")
    return norm(hidden, "transformer.ln_f")


def test_scores_and_loss_equal_an_independent_implementation(sasrec: Backbone) -> None:
    weights = dict(sasrec.model.named_parameters())
    model, objective = SplitModel(sasrec.model, 1, 1).eval(), objective_of(sasrec)
    items = weights["transformer.wte.weight"][1:]
    expected = [items @ by_hand(weights, row[row >= 0] + 1)[-1] for row in HISTORIES]
    ranker = SimilarityRanker(objective)
    ranker.refresh(model)
    torch.testing.assert_close(ranker.scores(model, HISTORIES), torch.stack(expected), rtol=1e-5, atol=1e-5)
    is_target = HISTORIES >= 0
    is_target[:, 0] = False
    total, count = objective.loss(model, objective.collate(HISTORIES, is_target))
    wanted = [F.cross_entropy(by_hand(weights, r[:-1] + 1) @ items.T, r[1:], reduction="sum")
              for row in HISTORIES[:2] for r in [row[row >= 0]]]  # fmt: skip
    assert count == 4
    torch.testing.assert_close(total, sum(wanted), rtol=1e-5, atol=1e-5)


def test_vectors_are_normalised_for_cosine_and_not_for_dot(sasrec: Backbone) -> None:
    model = SplitModel(sasrec.model, 1, 1).eval()
    rows = sasrec.model.transformer.wte.weight[1:]
    torch.testing.assert_close(objective_of(sasrec).item_vectors(model), rows, rtol=0, atol=0)
    cosine = objective_of(sasrec, similarity="cosine")
    torch.testing.assert_close(cosine.item_vectors(model), rows / rows.norm(dim=1, keepdim=True))
    torch.testing.assert_close(cosine.queries(model, HISTORIES).norm(dim=1), torch.ones(3))
    with pytest.raises(ConfigError, match="objective.similarity=euclid is not allowed: cosine or dot"):
        objective_of(sasrec, similarity="euclid")


SMALL = [
    *("backbone=sasrec", "backbone.hidden_size=32", "data.reader.num_users=300", "data.reader.num_items=60"),
    *("data.reader.mean_length=16", "partition.num_clients=3", "trainer.num_rounds=4", "trainer.batch_size=16"),
    *("trainer.learning_rate=5e-3", "references.show=[popularity,markov,pretrained]"),
]


def build(cache: Path, *overrides: str) -> tuple[object, Recommender]:
    config = compose([*SMALL, f"cache_dir={cache}", *overrides])
    return config, build_recommender(config, build_data(config))


@pytest.mark.parametrize("rule", ["centralized", "fedavg"])
def test_it_learns_the_transitions_of_the_synthetic_data(cache: Path, rule: str) -> None:
    """The synthetic users follow transitions between items, which popularity does not model."""
    config, recommender = build(cache, f"aggregation={rule}")
    loop = build_loop(config, recommender, ())  # type: ignore[arg-type]
    learned = loop.run().evaluation.summary["ndcg_at_10/pooled"]
    references = {result.rule: result.evaluation.summary["ndcg_at_10/pooled"]
                  for result in reference_results(config, recommender, loop)}  # type: ignore[arg-type]  # fmt: skip
    assert list(references) == ["popularity", "markov", "untrained"], "the backbone is not pre-trained"
    assert learned > 1.5 * references["popularity"]
    assert learned > 1.5 * references["untrained"]


def test_the_executed_cut_gives_the_same_metrics(cache: Path) -> None:
    summaries = []
    for split in ("default", "executed"):
        config, recommender = build(cache, f"split={split}", "split.head_layers=0", "trainer.num_rounds=1")
        summaries.append(build_loop(config, recommender, ()).run().evaluation.summary)  # type: ignore[arg-type]
    assert summaries[0] == summaries[1]


def test_an_objective_that_needs_text_is_refused(cache: Path) -> None:
    with pytest.raises(ConfigError, match=r"backbone=sasrec has item tokens only, but objective.history_fields"):
        build(cache, "objective=generative")
    with pytest.raises(ConfigError, match=r"objective.item_fields=\['title', 'genre'\]; both must be \[item_id\]"):
        build(cache, "objective=retrieval")


def test_an_exported_adapter_can_be_loaded(cache: Path, tmp_path: Path) -> None:
    from fellrec.models.backbone import load_hf

    _, recommender = build(cache)
    recommender.adapter.save(recommender.initial, recommender.backbone, lambda: {}, tmp_path / "shared")
    loaded = load_hf(str(tmp_path / "shared"))
    assert loaded.tokenizer(list(recommender.data.catalogue.item_ids))["input_ids"] == [[n] for n in range(1, 61)]
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, recommender.initial[name])


def test_plan_counts_its_parameters_without_weights(cache: Path) -> None:
    from fellrec.cli.plan import plan

    (row,) = plan([*SMALL, f"cache_dir={cache}", "split.head_layers=0"])
    assert row.plan.num_parameters == build(cache)[1].backbone.num_parameters
