"""The retrieval objective with encoders: its vectors equal those of Transformers, and do not depend on targets.

The models have random weights; the tokenizer is a WordPiece tokenizer with [CLS] and [SEP], like BERT's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    LongformerConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    XLMRobertaConfig,
)

from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.data.schema import Catalogue
from fellrec.errors import BackboneError, ConfigError
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.federated.callback import FederatedCallback
from fellrec.models.backbone import Backbone, load_hf
from fellrec.models.objectives.generative import GenerativeObjective
from fellrec.models.objectives.retrieval import RetrievalObjective
from fellrec.models.settings import GenerativeSettings, RetrievalSettings
from fellrec.models.split import SplitModel

TITLES = ("Alien", "Heat of the Day", "Amélie", "M", "Brazil")
CATALOGUE = Catalogue(tuple("abcde"), TITLES, pd.DataFrame({"genre": ["Horror", "Crime", None, "Thriller", "Satire"]}))
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 260,
    "pad_token_id": 0,
}
CONFIGS = {
    "bert": BertConfig(**SHAPE),
    "roberta": RobertaConfig(**SHAPE),
    "longformer": LongformerConfig(**SHAPE, attention_window=8),
    "xlm-roberta": XLMRobertaConfig(**SHAPE),
    "distilbert": DistilBertConfig(
        vocab_size=300, dim=32, hidden_dim=64, n_layers=3, n_heads=2, max_position_embeddings=260
    ),
    "mpnet": MPNetConfig(**{**SHAPE, "pad_token_id": 1}),  # its positions start after 1, whatever the padding token is
    "modernbert": ModernBertConfig(
        **SHAPE, local_attention=8, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3
    ),
}
ENCODERS = list(CONFIGS)


def tokenizer_for(texts: list[str]) -> Any:
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer, wordpiece.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    wordpiece.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    ends = [("[CLS]", special.index("[CLS]")), ("[SEP]", special.index("[SEP]"))]
    wordpiece.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=wordpiece, **names)


def write_models(folder: Path, texts: list[str]) -> Path:
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder / name)
        tokenizer_for(texts).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("encoders"), CATALOGUE.texts())


@pytest.fixture(params=ENCODERS)
def backbone(request: pytest.FixtureRequest, folder: Path) -> Backbone:
    loaded = load_hf(str(folder / request.param))
    loaded.model.eval()
    return loaded


def objective_of(backbone: Backbone, **settings: Any) -> RetrievalObjective:
    return RetrievalObjective(
        backbone.tokenizer, CATALOGUE, 4, RetrievalSettings(**settings), is_causal=backbone.arch.is_causal
    )


def own_hidden(backbone: Backbone, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and mask of the Transformers tokenizer and model, with [CLS] and without [SEP]."""
    tokenizer = backbone.tokenizer
    ids = [tokenizer(text)["input_ids"][:-1] for text in texts]
    given = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    more = {}
    if backbone.model.config.model_type == "longformer":
        more["global_attention_mask"] = torch.zeros_like(given["input_ids"]).index_fill_(1, torch.tensor([0]), 1)
    hidden = backbone.model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], **more)
    return hidden.last_hidden_state, given["attention_mask"]


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_history_vectors_equal_those_of_transformers(backbone: Backbone, pooling: str) -> None:
    objective, model = objective_of(backbone, pooling=pooling), SplitModel(backbone.model, 1, 1)
    histories = torch.tensor([[0, 1, 2, 4], [3, -1, -1, -1], [4, 1, -1, -1]])
    hidden, mask = own_hidden(backbone, ["Brazil Amélie Heat of the Day Alien", "M", "Heat of the Day Brazil"])
    assert mask.sum(dim=1).unique().numel() > 1, "there is padding"
    expected = hidden[:, 0] if pooling == "first" else (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    torch.testing.assert_close(objective.queries(model, histories), F.normalize(expected, dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_with_two_towers_items_are_pooled_like_histories(backbone: Backbone, pooling: str) -> None:
    objective = objective_of(backbone, pooling=pooling, item_encoder="encoded", similarity="dot", chunk_items=2)
    hidden, mask = own_hidden(backbone, CATALOGUE.texts())
    expected = hidden[:, 0] if pooling == "first" else (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    model = SplitModel(backbone.model, 1, 1)
    torch.testing.assert_close(objective.item_vectors(model), expected, rtol=1e-5, atol=1e-5)
    hidden, mask = own_hidden(backbone, ["Alien"])
    query = hidden[0, 0] if pooling == "first" else hidden[0].mean(dim=0)
    logits = F.normalize(expected, dim=1) @ F.normalize(query, dim=0) / 0.05
    batch = objective.collate(torch.tensor([[0, 1]]), torch.tensor([[False, True]]))
    loss, count = objective_of(backbone, pooling=pooling, item_encoder="encoded").loss(model, batch)
    assert count == 1
    torch.testing.assert_close(loss, F.cross_entropy(logits[None], torch.tensor([1])), rtol=1e-4, atol=1e-4)


def test_items_of_token_embeddings(backbone: Backbone) -> None:
    """The mean of the text's embeddings, without [CLS] and padding."""
    vectors = objective_of(backbone, similarity="dot").item_vectors(SplitModel(backbone.model, 1, 1))
    for item, text in enumerate(CATALOGUE.texts()):
        ids = torch.tensor(backbone.tokenizer(text, add_special_tokens=False)["input_ids"])
        torch.testing.assert_close(vectors[item], backbone.model.get_input_embeddings()(ids).mean(dim=0))


def test_the_target_and_later_items_do_not_change_the_vector(backbone: Backbone) -> None:
    """Rows that differ only in the target and the items after it have bit-identical vectors."""
    objective, model = objective_of(backbone), SplitModel(backbone.model, 1, 1)
    assert objective.one_target_per_row
    items = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 4, 3, 4], [0, 1, 2, 0, 1], [0, 2, 2, 3, 4]])
    is_target = torch.zeros_like(items, dtype=torch.bool).index_fill_(1, torch.tensor([2]), True)
    batch = objective.collate(items, is_target)
    assert batch["targets"].tolist() == [2, 4, 2, 2]
    (hidden,) = [model(ids) for ids in objective.inputs(batch)]
    vectors = hidden[batch["rows"], 0]
    assert torch.equal(vectors[0], vectors[1]), "another target"
    assert torch.equal(vectors[0], vectors[2]), "other items after the target"
    assert not torch.allclose(vectors[0], vectors[3]), "another history"
    evaluated = objective.queries(model, torch.tensor([[0, 1, -1, -1]]))
    torch.testing.assert_close(evaluated[0], F.normalize(vectors[0], dim=0), rtol=1e-5, atol=1e-6)


def test_padding_does_not_change_a_vector(backbone: Backbone) -> None:
    objective, model = objective_of(backbone, pooling="mean"), SplitModel(backbone.model, 1, 1)
    alone = objective.queries(model, torch.tensor([[3, -1, -1, -1]]))
    beside = objective.queries(model, torch.tensor([[3, -1, -1, -1], [0, 1, 2, 1]]))
    torch.testing.assert_close(beside[0], alone[0], rtol=1e-5, atol=1e-6)
    ids, _ = objective._history_tokens(torch.tensor([[3, -1, -1, -1], [0, 1, 2, 1]]))
    assert (ids[0] < 0).any()
    seen = model(ids.masked_fill(ids < 0, backbone.tokenizer.pad_token_id))[0, 0]
    assert not torch.allclose(seen, model(ids)[0, 0], atol=1e-4), "padding as ordinary tokens would change it"


@pytest.mark.parametrize(
    ("is_causal", "settings", "message"),
    [
        (
            False,
            {"order": "oldest_first"},
            "order=oldest_first is not allowed with an encoder.*attend to its own target",
        ),
        (False, {"pooling": "last"}, "pooling=last is not allowed with an encoder.*choose from: first, mean"),
        (True, {"pooling": "first"}, "pooling=first is not allowed with a causal backbone.*choose from: last, mean"),
    ],
)
def test_invalid_orders_and_poolings_are_refused(is_causal: bool, settings: Any, message: str, folder: Path) -> None:
    tokenizer = load_hf(str(folder / "bert")).tokenizer
    with pytest.raises(ConfigError, match=message):
        RetrievalObjective(tokenizer, CATALOGUE, 4, RetrievalSettings(**settings), is_causal=is_causal)


def test_pooling_of_the_first_token_needs_a_tokenizer_with_one(folder: Path) -> None:
    tokenizer = load_hf(str(folder / "bert")).tokenizer
    tokenizer.cls_token = None
    with pytest.raises(BackboneError, match="pooling=first needs a tokenizer with a .CLS. or BOS token"):
        RetrievalObjective(tokenizer, CATALOGUE, 4, RetrievalSettings(), is_causal=False)
    assert RetrievalObjective(tokenizer, CATALOGUE, 4, RetrievalSettings(pooling="mean"), is_causal=False).prefix == []


def test_the_generative_objective_refuses_an_encoder(folder: Path) -> None:
    tokenizer = load_hf(str(folder / "bert")).tokenizer
    with pytest.raises(ConfigError, match="objective=generative needs a causal backbone.*use objective=retrieval"):
        GenerativeObjective(tokenizer, CATALOGUE, 10, GenerativeSettings(), is_causal=False)


@pytest.fixture(scope="module")
def overrides(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides of a small run; the first one has the parent folder of the backbones, see ``named``."""
    given = [item for item in tiny_overrides if not item.startswith("backbone.")]
    catalogue = build_data(compose(given)).catalogue
    folder = write_models(tmp_path_factory.mktemp("run_encoders"), catalogue.texts())
    short = ["data.max_users=40", "data.max_history=3", "backbone=hf", "objective=retrieval"]
    return [f"backbone.path={folder}", *given, *short]


def named(overrides: list[str], name: str, *more: str) -> list[str]:
    return [f"{overrides[0]}/{name}", *overrides[1:], *more]


class Losses(FederatedCallback):
    """The loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step_end(self, loss: float) -> None:
        self.values.append(loss)


def trained(overrides: list[str]) -> tuple[list[float], dict[str, torch.Tensor], dict[str, float]]:
    """Losses of all steps, adapters of the whole model, and the test metrics."""
    config, losses = compose(overrides), Losses()
    loop = build_loop(config, build_recommender(config, build_data(config)), (losses,))
    summary = dict(loop.run().evaluation.summary)
    return losses.values, loop.population.bank.tensors, summary


@pytest.mark.parametrize("name", ["bert", "longformer"])
def test_the_loss_decreases(overrides: list[str], name: str) -> None:
    """20 epochs on few rows."""
    few = ["data.max_train_samples=32", "trainer.local_epochs=20", "trainer.num_rounds=1", "trainer.learning_rate=3e-3"]
    given = [*few, "adapter=full", "aggregation=centralized", "objective.temperature=0.2"]
    losses, _, _ = trained(named(overrides, name, *given))
    assert len(losses) == 40
    assert sum(losses[-8:]) < 0.8 * sum(losses[:8])


@pytest.mark.parametrize("adapter", ["full", "lora"])
@pytest.mark.parametrize("name", ["bert", "longformer"])
def test_a_run_with_the_executed_cut_is_bit_identical(overrides: list[str], name: str, adapter: str) -> None:
    """With dropout. With LoRA there are two towers, so two batches of different padding cross the cuts together."""
    towers = ["objective.item_encoder=encoded", "objective.pooling=mean"] if adapter == "lora" else []
    given = named(overrides, name, f"adapter={adapter}", "trainer.num_rounds=1", "trainer.max_local_steps=2", *towers)
    whole, cut = trained(given), trained([*given, "split.transport=inprocess"])
    assert whole[0] == cut[0]
    assert whole[1].keys() == cut[1].keys()
    assert not [key for key in whole[1] if not torch.equal(whole[1][key], cut[1][key])]
    assert whole[2] == cut[2]


def test_a_frozen_head_changes_nothing(overrides: list[str]) -> None:
    """The server finds padding by the hidden states alone, and no gradient of them is sent back."""
    config = named(overrides, "roberta", "adapter=lora", "adapter.layers=body+tail", "trainer.num_rounds=1")
    given = [*config, "trainer.max_local_steps=3"]
    whole, cut = trained(given), trained([*given, "split.transport=inprocess"])
    assert whole[0] == cut[0]
    assert not [key for key in whole[1] if not torch.equal(whole[1][key], cut[1][key])]
    assert whole[2] == cut[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "longformer"])
def test_train_works_from_the_command_line(
    overrides: list[str], name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an encoder's defaults: newest first, pooling of the first token, LoRA on query and value."""
    where = [f"tracking.uri=sqlite:///{folder / 'mlflow.db'}", f"run_dir={tmp_path / 'run'}"]
    main(["train", *named(overrides, name, "trainer.num_rounds=1", "references.show=[popularity]", *where)])
    assert "FELLRec" in capsys.readouterr().out
    saved = json.loads((tmp_path / "run" / "adapters" / "client_00" / "adapter_config.json").read_text())
    assert {"query", "value"} <= set(saved["target_modules"])
    assert saved["task_type"] == "FEATURE_EXTRACTION"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["objective=generative"], "objective=generative needs a causal backbone"),
        (["objective.order=oldest_first"], "objective.order=oldest_first is not allowed with an encoder"),
        *(([f"ranker={name}"], f"ranker={name} needs objective=generative") for name in ("likelihood", "grounding")),
        (["ranker=constrained"], "ranker=constrained needs objective=generative"),
        (["data.max_history=100"], "a history can have .* tokens, but the backbone's context is 260"),
    ],
)
def test_settings_that_need_a_causal_backbone_are_refused_before_training(
    overrides: list[str], more: list[str], message: str
) -> None:
    config = compose(named(overrides, "bert", *more))
    with pytest.raises((ConfigError, BackboneError), match=message):
        build_recommender(config, build_data(config))
