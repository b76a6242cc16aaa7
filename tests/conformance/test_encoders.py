"""Encoders: head, body and tail, the executed cut, adapters and files are bit-identical to the Transformers model.

Padding is on the right. What an encoder computes there is never read, so only the places of tokens are compared.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cut_models import cut_in_two, open_slot
from peft import PeftModel
from small_models import ENCODERS, LAYERS, WITHOUT_POOLER
from torch import Tensor
from transformers import AutoModel, AutoModelForMaskedLM, MPNetConfig, OPTConfig

from fellrec.errors import BackboneError
from fellrec.functional.packing import PACKINGS, pack, unpack
from fellrec.models.adapters import FullAdapter, LoraAdapter
from fellrec.models.architectures import ARCHITECTURES, arch_of, check_config, context_of
from fellrec.models.backbone import load_hf
from fellrec.models.encoders import tokens_of
from fellrec.models.partial import load_partial
from fellrec.models.split import SplitModel
from fellrec.models.tiny import build_tokenizer

LENGTHS = {"full": [9, 9, 9], "padded": [9, 3, 6]}


def whole_model(name: str, **changed: Any) -> Any:
    torch.manual_seed(0)
    config = ENCODERS[name].__class__(**{**ENCODERS[name].to_dict(), **changed})
    model = AutoModel.from_config(config, **WITHOUT_POOLER[name]).eval()
    for shared in ARCHITECTURES[name].shared:  # frozen, see FullAdapter
        model.get_submodule(shared).requires_grad_(False)
    return model


def dropouts(name: str) -> dict[str, float]:
    """All dropout probabilities of a configuration."""
    return {
        key: 0.2
        for key in ENCODERS[name].to_dict()
        if "dropout" in key
        and not key.endswith("layerdrop")
        and key not in ("seq_classif_dropout", "classifier_dropout")
    }


def texts(lengths: str) -> tuple[Tensor, Tensor]:
    """Token ids with negative padding, and their mask."""
    inside = torch.arange(9)[None, :] < torch.tensor(LENGTHS[lengths])[:, None]
    ids = torch.randint(3, 97, (3, 9), generator=torch.Generator().manual_seed(1))
    return ids.masked_fill(~inside, -1), inside


def own_forward(model: Any, ids: Tensor, inside: Tensor) -> Tensor:
    """The Transformers model with padding token, mask and, for Longformer, a global first token, as documented."""
    more = {}
    if model.config.model_type == "longformer":
        more["global_attention_mask"] = torch.zeros_like(ids).index_fill_(1, torch.tensor([0]), 1)
    padded = ids.masked_fill(~inside, model.config.pad_token_id)
    return model(input_ids=padded, attention_mask=inside.long(), **more).last_hidden_state


def gradients(model: torch.nn.Module, hidden: Tensor, inside: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (hidden[inside] * torch.linspace(-1, 1, 32)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ENCODERS)
def test_forward_and_every_gradient_are_exact(name: str, lengths: str) -> None:
    model, (ids, inside) = whole_model(name), texts(lengths)
    whole = own_forward(model, ids, inside)
    expected = gradients(model, whole, inside)
    assert len(expected) > LAYERS
    for head, tail in [(0, 0), (1, 1), (2, 3), (LAYERS, 0), (0, LAYERS), (3, 1)]:
        hidden = SplitModel(model, head, tail)(ids)
        assert torch.equal(hidden[inside], whole[inside]), (head, tail)
        found = gradients(model, hidden, inside)
        assert found.keys() == expected.keys()
        different = [key for key in expected if not torch.equal(found[key], expected[key])]
        assert not different, (head, tail)


@pytest.mark.parametrize("name", ENCODERS)
def test_attention_can_be_explicit_and_is_nothing_else_where_there_is_no_other(name: str) -> None:
    torch.manual_seed(0)
    config = copy.deepcopy(ENCODERS[name])
    explicit = AutoModel.from_config(config, attn_implementation="eager", **WITHOUT_POOLER[name]).eval()
    ids, _ = texts("padded")
    whole = SplitModel(whole_model(name), 2, 1)
    whole.use_attention("eager")
    assert torch.equal(whole(ids), SplitModel(explicit, 0, 0)(ids))
    whole.use_attention("sdpa")
    assert whole.attention == whole_model(name).config._attn_implementation
    assert whole.attention == ("eager" if name in ("longformer", "mpnet") else "sdpa")


@pytest.mark.parametrize("name", ENCODERS)
def test_dropout_draws_the_same_numbers(name: str) -> None:
    """As many as the forward pass of Transformers draws: padding to a window must not be embedded twice."""
    model = whole_model(name, **dropouts(name)).train()
    split, (ids, inside) = SplitModel(model, 2, 1).train(), texts("full")
    if name == "longformer":
        ids, inside = ids[:, :8], inside[:, :8]  # a whole window, without padding that would also draw numbers
    torch.manual_seed(1)
    whole = own_forward(model, ids, inside)
    torch.manual_seed(1)
    assert torch.equal(split(ids), whole)
    torch.manual_seed(2)
    assert not torch.equal(split(ids), whole), "dropout is on"


@pytest.mark.parametrize("name", ENCODERS)
def test_parts_own_all_parameters_under_their_own_names(name: str) -> None:
    model = whole_model(name)
    split = SplitModel(model, 2, 1)
    parts = split.part_of_parameter()
    assert list(parts) == [key for key, _ in model.named_parameters()]
    assert not any("pooler" in key for key in parts), "unused parameters are neither trained nor sent"
    for layer, part in enumerate(["head", "head", "body", "body", "tail"]):
        prefix = f"{ARCHITECTURES[name].layers}.{layer}."
        assert {parts[key] for key in parts if key.startswith(prefix)} == {part}
    assert {parts[key] for key in parts if key.startswith("embeddings.")} == {"head"}
    assert len(list(split.parameters())) == len(list(model.parameters())), "nothing is listed twice"


@pytest.mark.parametrize("name", ENCODERS)
def test_lora_is_exact_through_the_cuts_and_through_peft(name: str, tmp_path: Path) -> None:
    model, fresh, (ids, inside) = whole_model(name), whole_model(name), texts("padded")
    base = own_forward(model.requires_grad_(False), ids, inside)  # the order of summation depends on frozen parameters
    adapter, split = LoraAdapter(dropout=0.0), SplitModel(model, 2, 1)
    adapter.attach(model, split.arch, 0, split.part_of)
    assert torch.equal(own_forward(model, ids, inside), base), "B starts at zero"
    adapted = {key.split(".lora_")[0].rpartition(".")[2] for key in adapter.trainable(model)}
    globally = {"query_global", "value_global"} if name == "longformer" else set()
    assert adapted == {
        "distilbert": {"q_lin", "v_lin"},
        "mpnet": {"q", "v"},
        "modernbert": {"Wqkv"},
    }.get(name, {"query", "value"} | globally)
    with torch.no_grad():
        for parameter in adapter.trainable(model).values():
            parameter.normal_(std=0.1)
    adapter.save(adapter.trainable(model), None, dict, tmp_path)
    whole = own_forward(model, ids, inside)
    assert not torch.equal(whole[inside], base[inside])
    assert torch.equal(split.eval()(ids)[inside], whole[inside])
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(own_forward(loaded, ids, inside), whole)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForMaskedLM])
@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_loads_from_its_folder(name: str, kind: Any, tmp_path: Path) -> None:
    """Files with and without a head, as whole and partial models; a full adapter is saved as such a folder."""
    torch.manual_seed(0)
    saved, (ids, inside) = kind.from_config(ENCODERS[name]).eval(), texts("padded")
    saved.requires_grad_(False)  # like partial models: the order of summation depends on it
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    build_tokenizer(["a"], vocab_size=259).save_pretrained(tmp_path)
    backbone = load_hf(str(tmp_path))
    assert backbone.arch == ARCHITECTURES[name]
    assert not backbone.arch.is_causal
    expected = own_forward(saved.base_model, ids, inside)
    assert torch.equal(own_forward(backbone.model.requires_grad_(False), ids, inside), expected)
    client_lm, server_lm = (load_partial(tmp_path, side, 2, 1, torch.float32) for side in ("client", "server"))
    owned = [{key for key, _ in part.named_parameters()} for part in (client_lm, server_lm)]
    assert owned[0] & owned[1] == {f"{module}.weight" for module in backbone.arch.shared}
    assert owned[0] | owned[1] == {key for key, _ in backbone.model.named_parameters()}
    server = SplitModel(server_lm, 2, 1)

    class Body:
        def run_body(self, hidden: Tensor, mask: Tensor | None, positions: str, cache: Any) -> Tensor:
            assert mask is None, "no mask is sent"
            return server.serve_body(hidden, mask, positions, cache)

    client = SplitModel(client_lm, 2, 1, Body())  # type: ignore[arg-type]
    assert torch.equal(client(ids)[inside], expected[inside])
    trained = dict(backbone.model.named_parameters())
    FullAdapter().save(trained, backbone, dict, tmp_path / "full")
    again = AutoModel.from_pretrained(tmp_path / "full", **WITHOUT_POOLER[name]).eval().requires_grad_(False)
    assert torch.equal(own_forward(again, ids, inside), expected)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ENCODERS)
def test_the_executed_cut_is_exact(name: str, lengths: str) -> None:
    """Forward in evaluation, and every gradient in training; only hidden states and gradients cross the cuts."""
    whole, (ids, inside) = whole_model(name), texts(lengths)
    expected = gradients(whole, own_forward(whole, ids, inside), inside)
    client, link, server = cut_in_two(whole, 2, 1)
    with torch.no_grad(), link.on_behalf_of(0, 0, "val"):
        assert is_same(name, client(ids)[inside], own_forward(whole, ids, inside)[inside])
    assert link.ledger.total(direction="up") == link.ledger.total(direction="down") == 3 * 9 * 32 * 4
    open_slot(link, server, 1)
    with link.on_behalf_of(1, 0, "train"):
        (hidden_BLD,) = client.train().encode([ids])
        found = gradients(client.model, hidden_BLD, inside)
    found |= {key: p.grad for key, p in server.jobs[1].slot.parameters.items() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert not [key for key in expected if not is_same(name, found[key], expected[key])]


def is_same(name: str, found: Tensor, expected: Tensor) -> bool:
    """Equal to the last bit; with Longformer, which differs there on CPUs without AVX-512, nearly equal."""
    if name == "longformer":
        return torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    return torch.equal(found, expected)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_longest_text_fits_and_a_longer_one_does_not(name: str) -> None:
    split = SplitModel(whole_model(name), 2, 1)
    assert (
        split.context
        == context_of(ENCODERS[name])
        == (64 if name in ("roberta", "xlm-roberta", "longformer", "mpnet") else 66)
    )
    split(torch.full((1, split.context), 5))
    if name != "modernbert":  # its positions are rotations, which exist for any length
        with pytest.raises((IndexError, RuntimeError)):
            split(torch.full((1, split.context + 1), 5))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MPNetConfig(pad_token_id=0), "x: pad_token_id=0 in config.json is not supported with model_type mpnet: 1"),
        (OPTConfig(hidden_size=32, word_embed_proj_dim=16), "word_embed_proj_dim=16 .* not supported .* opt: 32"),
        (OPTConfig(layerdrop=0.1), "layerdrop=0.1 in config.json is not supported with model_type opt: 0.0"),
    ],
)
def test_fields_that_a_cut_model_cannot_have_are_refused(config: Any, message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        check_config("x", config)


def test_an_encoder_configured_as_a_decoder_is_refused() -> None:
    with pytest.raises(BackboneError, match="model_type bert with is_decoder=true is not supported"):
        arch_of(ENCODERS["bert"].__class__(is_decoder=True))


@pytest.mark.parametrize("dtype", PACKINGS)
def test_padding_is_recognised_with_every_packing(dtype: str) -> None:
    (ids, inside), model = texts("padded"), SplitModel(whole_model("bert"), 2, 1)
    arrived = unpack(pack(model.head(ids).detach(), dtype), torch.float32, torch.device("cpu"))
    assert torch.equal(tokens_of(arrived), inside)


def test_incomplete_files_of_an_encoder_are_refused(tmp_path: Path) -> None:
    model = whole_model("bert")
    weights = {key: tensor for key, tensor in model.state_dict().items() if "layer.3.output" not in key}
    model.save_pretrained(tmp_path, state_dict=weights)
    build_tokenizer(["a"], vocab_size=259).save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=r"do not match config.json; missing 4 \(encoder.layer.3.output"):
        load_hf(str(tmp_path))


@pytest.mark.parametrize("name", ENCODERS)
def test_a_partial_encoder_refuses_to_run_as_a_whole(name: str) -> None:
    client, _, _ = cut_in_two(whole_model(name), 2, 1)
    with pytest.raises(AssertionError, match="runs part by part"):
        client.model(input_ids=torch.full((1, 8), 5))
