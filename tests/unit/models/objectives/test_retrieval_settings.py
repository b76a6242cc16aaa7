"""Settings of the retrieval objective: text, order, pooling, chunked and sampled softmax, cached item vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from fellrec.config.compose import compose
from fellrec.data.schema import Catalogue
from fellrec.errors import ConfigError
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import build_loop
from fellrec.functional.softmax import chunked_cross_entropy, draw_items, sampled_cross_entropy
from fellrec.models.backbone import Backbone
from fellrec.models.objectives import groups as row_groups
from fellrec.models.objectives.retrieval import RetrievalObjective
from fellrec.models.settings import RetrievalSettings, TinySettings
from fellrec.models.split import SplitModel
from fellrec.models.streams import StreamPosition
from fellrec.models.tiny import build_tiny

TITLES = ("Alien", "Heat (1995)", "Amélie", "M")
CATALOGUE = Catalogue(tuple("abcd"), TITLES, pd.DataFrame({"genre": ["Horror", "Crime", None, "Thriller"]}))


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return build_tiny(
        [f"{text}\n" for text in CATALOGUE.texts()], TinySettings(hidden_size=16, num_layers=2, vocab_size=320)
    )


@pytest.fixture(scope="module")
def model(tiny: Backbone) -> SplitModel:
    return SplitModel(tiny.model, 1, 1).eval()


def hidden_of(tiny: Backbone, titles: list[str]) -> torch.Tensor:
    text = "".join(f"{title}\n" for title in titles)
    ids = [tiny.tokenizer.bos_token_id, *tiny.tokenizer(text, add_special_tokens=False)["input_ids"]]
    return tiny.model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]


def test_key_value_text_skips_missing_values() -> None:
    assert CATALOGUE.texts(("title", "genre"), "key_value") == [
        "title: Alien genre: Horror", "title: Heat (1995) genre: Crime", "title: Amélie", "title: M genre: Thriller",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="objective.text"):
        CATALOGUE.texts(style="json")


def test_newest_first_pools_the_end_of_the_reversed_text(tiny: Backbone, model: SplitModel) -> None:
    """One target per row; items after the target are neither in the text nor in the loss."""
    objective = RetrievalObjective(tiny.tokenizer, CATALOGUE, 3, RetrievalSettings(order="newest_first"))
    assert objective.one_target_per_row
    queries = objective.queries(model, torch.tensor([[0, 1, 2], [3, -1, -1]]))
    for row, titles in enumerate([["Amélie", "Heat (1995)", "Alien"], ["M"]]):
        torch.testing.assert_close(queries[row], F.normalize(hidden_of(tiny, titles)[-1], dim=0), rtol=1e-4, atol=1e-5)
    batch = objective.collate(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[False, False, True, False]]))
    loss, count = objective.loss(model, batch)
    logits = F.normalize(hidden_of(tiny, ["Heat (1995)", "Alien"])[-1], dim=0) @ objective.item_vectors(model).T / 0.05
    assert count == 1
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor(2)), rtol=1e-4, atol=1e-4)


def test_mean_pooling_averages_the_tokens_of_the_history(tiny: Backbone, model: SplitModel) -> None:
    objective = RetrievalObjective(tiny.tokenizer, CATALOGUE, 3, RetrievalSettings(pooling="mean"))
    queries = objective.queries(model, torch.tensor([[0, 1, -1], [3, -1, -1]]))
    for row, titles in enumerate([["Alien", "Heat (1995)"], ["M"]]):
        expected = F.normalize(hidden_of(tiny, titles).mean(dim=0), dim=0)
        torch.testing.assert_close(queries[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_items", [1, 3, 7, 50])
def test_chunks_give_the_full_softmax_and_its_gradients(chunk_items: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query, items = (torch.randn(size, 5, generator=generator, requires_grad=True) for size in (6, 10))
    targets = torch.tensor([0, 9, 3, 3, 7, 1])
    full = F.cross_entropy(query @ items.T, targets, reduction="sum")
    expected = torch.autograd.grad(full, (query, items))
    found = chunked_cross_entropy(query, items, targets, chunk_items)
    torch.testing.assert_close(found, full)
    for mine, theirs in zip(torch.autograd.grad(found, (query, items)), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["chunked", "sampled"])
def test_under_autocast_products_are_in_bfloat16_and_sums_in_float32(how: str) -> None:
    """The expected loss has products in bfloat16 and a softmax in float32; the sample has each item as often as expected.

    It equals the full softmax under autocast up to the precision of bfloat16, in value and gradients.
    """
    generator = torch.Generator().manual_seed(0)
    query, items = (3 * torch.randn(size, 16, generator=generator) for size in (12, 500))
    targets = torch.arange(12) * 40
    pair = (query.requires_grad_(), items.requires_grad_())
    by_hand = F.cross_entropy((query.bfloat16() @ items.bfloat16().T).float(), targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        full = F.cross_entropy(query @ items.T, targets, reduction="sum")
        if how == "chunked":
            found = chunked_cross_entropy(query, items, targets, 64)
        else:
            found = sampled_cross_entropy(query, items, targets, torch.arange(500), torch.ones(500))
    gradients = torch.autograd.grad(found, pair)
    assert {tensor.dtype for tensor in (found, *gradients)} == {torch.float32}
    exact = F.cross_entropy(query @ items.T, targets, reduction="sum")
    assert abs(exact - by_hand) > 1e-4 * by_hand, "rounding changes the loss"
    # The product of the target is not rounded in the sampled loss.
    torch.testing.assert_close(found, by_hand, rtol=1e-6 if how == "chunked" else 2e-3, atol=0)
    torch.testing.assert_close(found, full, rtol=1e-6 if how == "chunked" else 2e-3, atol=0)
    for mine, theirs in zip(gradients, torch.autograd.grad(full, pair), strict=True):
        assert (mine - theirs).norm() < 2**-7 * theirs.norm()


def test_the_estimate_of_the_denominator_is_unbiased() -> None:
    """For any proposal, exp(loss + target logit) is an unbiased estimate of the sum of exponentials."""
    generator = torch.Generator().manual_seed(1)
    query, items = torch.randn(1, 4, generator=generator), torch.randn(8, 4, generator=generator)
    target = torch.tensor([2])
    weights = torch.tensor([5, 1, 1, 1, 2, 9, 1, 1], dtype=torch.float64)
    probabilities = weights / weights.sum()
    of_target = (query @ items[2]).double()
    torch.manual_seed(3)
    found = [
        (
            sampled_cross_entropy(
                query, items, target, draw_items(probabilities.cumsum(0), 20), 20 * probabilities
            ).double()
            + of_target
        ).exp()
        for _ in range(3000)
    ]
    estimates = torch.stack(found)
    full = (query @ items.T).double().exp().sum()
    assert abs(estimates.mean() - full) < 4 * estimates.std() / 3000**0.5
    assert estimates.std() > 0


@pytest.mark.parametrize("item_encoder", ["tokens", "encoded"])
def test_only_the_drawn_items_are_encoded(tiny: Backbone, model: SplitModel, item_encoder: str) -> None:
    """Value and gradients equal those of the sampled loss with the vectors of all items; two of four are encoded."""
    settings = {"item_encoder": item_encoder, "num_negatives": 1}
    objective = RetrievalObjective(tiny.tokenizer, CATALOGUE, 3, RetrievalSettings(**settings))
    batch = objective.collate(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[False, False, False, True]]))
    with model.streams.using(StreamPosition(5)):
        drawn = objective.draw(batch, model.streams)
    (sampled,) = drawn["items"][drawn["sample_places"]].tolist()
    assert sampled != 3, "else the loss is 0"
    assert drawn["items"].tolist() == [sampled, 3]
    assert [len(ids) for ids in objective.inputs(drawn)] == ([1] if item_encoder == "tokens" else [1, 2])
    query = objective.queries(model, torch.tensor([[0, 1, 2]])) / 0.05
    every = objective.item_vectors(model)
    expected = sampled_cross_entropy(query, every, batch["targets"], torch.tensor([sampled]), torch.full((4,), 0.25))
    with model.streams.using(StreamPosition(5)):
        found, count = objective.loss(model, batch)
    assert count == 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    parameters = list(tiny.model.model.parameters())
    both = (torch.autograd.grad(loss, parameters) for loss in (found, expected))
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def trained(overrides: list[str]) -> tuple[dict[str, Any], float]:
    config = compose(overrides)
    loop = build_loop(config, build_recommender(config, build_data(config)), ())
    summary = dict(loop.run().evaluation.summary)
    return summary, sum(float(tensor.double().sum()) for tensor in loop.population.bank.tensors.values())


@pytest.fixture
def short(tiny_overrides: list[str]) -> list[str]:
    return [
        *tiny_overrides,
        "data.max_users=40",
        "trainer.num_rounds=2",
        "trainer.max_local_steps=3",
        "data.max_history=3",
    ]


def test_chunks_do_not_change_results_and_samples_depend_on_the_seed(short: list[str]) -> None:
    whole, chunked = trained(short), trained([*short, "objective.chunk_items=7"])
    assert chunked[1] == pytest.approx(whole[1], rel=1e-4)
    sampled = [*short, "objective.num_negatives=20", "objective.negatives=popularity"]
    once, again, other = trained(sampled), trained(sampled), trained([*sampled, "seed=1"])
    assert once == again
    assert once[1] != other[1]
    assert once[1] != whole[1]


def test_cached_item_vectors(short: list[str]) -> None:
    """A refresh in every step differs from no table, which has gradients; a refresh per round equals a freeze at 0."""
    towers = [*short, "objective.item_encoder=encoded"]
    free, each = trained(towers), trained([*towers, "objective.refresh_items=1"])
    once, frozen = (
        trained([*towers, "objective.refresh_items=round"]),
        trained([*towers, "objective.freeze_items_after=0"]),
    )
    later = trained([*towers, "objective.freeze_items_after=1"])
    assert once == frozen
    assert len({free[1], each[1], once[1], later[1]}) == 4
    assert trained([*towers, "objective.refresh_items=3"]) == once, "three steps per round"


def test_outside_of_rounds_every_step_encodes_the_items(tiny: Backbone, model: SplitModel) -> None:
    """Without rounds, as in ``lightning.Trainer``, there is no table; ``inputs`` has only the inputs of every step."""
    each, kept = (
        RetrievalObjective(tiny.tokenizer, CATALOGUE, 3, RetrievalSettings(item_encoder="encoded", **settings))
        for settings in ({}, {"refresh_items": "round"})
    )
    batch = each.collate(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[False, False, True, True]]))
    assert torch.equal(kept.loss(model, batch)[0], each.loss(model, batch)[0])
    assert [len(objective.inputs(batch)) for objective in (each, kept)] == [2, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": "random"}, "objective.order"),
        ({"pooling": "max"}, "objective.pooling"),
        ({"text": "xml"}, "objective.text"),
        ({"chunk_items": 0}, "objective.chunk_items=0 is not allowed: a whole number of at least 1, or null"),
        ({"num_negatives": 4}, "objective.num_negatives=4 must be below the 4 items"),
        ({"num_negatives": 2, "chunk_items": 2}, "one of them must be null"),
        ({"num_negatives": 2, "negatives": "hard"}, "objective.negatives"),
        ({"refresh_items": "never", "item_encoder": "encoded"}, "objective.refresh_items=never is not allowed"),
        ({"refresh_items": 2}, "need objective.item_encoder=encoded"),
    ],
)
def test_invalid_settings_are_refused(tiny: Backbone, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RetrievalObjective(tiny.tokenizer, CATALOGUE, 3, RetrievalSettings(**settings))


def test_cached_item_vectors_need_the_whole_model(tiny_overrides: list[str], tmp_path: Path) -> None:
    cut = ["split=executed", "split.tail_layers=0", "objective.item_encoder=encoded", "objective.refresh_items=2"]
    config = compose([*tiny_overrides, *cut])
    with pytest.raises(ConfigError, match="need split.transport=none"):
        build_recommender(config, build_data(config))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"pooling": "mean", "num_negatives": 2},
        {"order": "newest_first", "item_encoder": "encoded"},
        {"item_encoder": "encoded", "refresh_items": "round"},
    ],
    ids=str,
)
def test_a_batch_in_groups_has_the_loss_and_gradients_of_the_whole(
    tiny: Backbone, model: SplitModel, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any]
) -> None:
    """The loss is a sum over rows, each of which is computed by itself; the sample of items is drawn once."""
    objective = RetrievalObjective(tiny.tokenizer, CATALOGUE, 3, RetrievalSettings(**how))
    items = torch.tensor([[0, 1, 2, 3], [3, 0, -1, -1], [1, 2, 0, -1], [2, 3, -1, -1]])
    is_target = items >= 0
    is_target[:, 0] = False
    if objective.one_target_per_row:
        is_target[0, 1:3] = is_target[2, 1] = False
    batch = objective.collate(items, is_target)
    found = []
    for groups in ([[0, 1, 2, 3]], [[0, 2], [1, 3]], [[0], [2], [1, 3]]):
        monkeypatch.setattr(row_groups, "length_groups", lambda lengths, rows=groups: list(map(torch.tensor, rows)))
        sizes = [len(ids) for ids in objective.inputs(batch)]
        assert sizes[: len(groups)] == list(map(len, groups))
        assert objective.inputs(batch)[len(groups) - 1].shape[1] == int(batch["lengths"][groups[-1]].max())
        model.zero_grad()
        with model.streams.using(StreamPosition(5)):
            objective.prepare_step(model, 0, 0)
            total, count = objective.loss(model, batch)
        total.backward()
        found.append((total.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        assert count == int(is_target.sum())
    for total, gradients in found[1:]:
        torch.testing.assert_close(total, found[0][0])
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-4, atol=1e-5)


def test_what_follows_a_rows_last_target_is_not_read(tiny: Backbone, model: SplitModel) -> None:
    """Two of five titles predict something; the others change neither loss nor gradients."""
    objective = RetrievalObjective(tiny.tokenizer, CATALOGUE, 5, RetrievalSettings())
    items = torch.tensor([[0, 1, 2, 3, 1, 0]])
    is_target = torch.tensor([[False, True, True, False, False, False]])
    found = [objective.collate(items[:, :width], is_target[:, :width]) for width in (6, 3)]
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_item_vectors_are_computed_once_for_each_state_of_the_weights(tiny: Backbone, model: SplitModel) -> None:
    """Also after other weights were used; a changed bit, another tensor in a weight's place or autocast is another."""
    objective = RetrievalObjective(tiny.tokenizer, CATALOGUE, 3, RetrievalSettings(item_encoder="encoded"))
    first = objective.kept_item_vectors(model)
    assert not first.requires_grad
    assert torch.equal(first, objective.item_vectors(model))
    norm = tiny.model.model.norm
    with torch.no_grad():
        weight = norm.weight.clone()
        norm.weight[0] = torch.nextafter(weight[0], weight[0] + 1)
        changed = objective.kept_item_vectors(model)
        assert torch.equal(changed, objective.item_vectors(model))
        norm.weight.copy_(weight)
    assert changed is not first
    assert objective.kept_item_vectors(model) is first
    own = norm.weight
    norm.weight = torch.nn.Parameter(own.detach() * 2)
    try:
        assert torch.equal(objective.kept_item_vectors(model), objective.item_vectors(model))
        assert objective.kept_item_vectors(model) is not first
    finally:
        norm.weight = own
    with torch.autocast("cpu", torch.bfloat16):
        assert objective.kept_item_vectors(model) is not first
    assert objective.kept_item_vectors(model) is first


def test_a_run_computes_the_vectors_of_a_shared_adapter_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """FedAvg's five clients begin with one adapter, which was also the one that was validated."""
    settings = [
        "data=synthetic", "data.reader.num_users=60", "data.reader.num_items=50", "data.max_history=3",
        "backbone.num_layers=2", "backbone.hidden_size=16", "backbone.pretrain.steps=2", "adapter=lora",
        "objective.item_encoder=encoded", "objective.refresh_items=round", "aggregation=fedavg",
        "trainer.num_rounds=2", "trainer.max_local_steps=2", "trainer.cutoffs=[10]", "references.show=[]",
    ]  # fmt: skip
    counted, compute = [], RetrievalObjective.item_vectors
    monkeypatch.setattr(
        RetrievalObjective, "item_vectors", lambda self, model: counted.append(1) or compute(self, model)
    )
    config = compose(settings)
    build_loop(config, build_recommender(config, build_data(config)), []).run()
    assert len(counted) == 3, "before training, and after each of two rounds"
