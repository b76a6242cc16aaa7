"""Adapters in PEFT's terms: all linear modules, modules that are trained as a whole, and what is saved of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import CONFIGS, ENCODERS, WITHOUT_POOLER
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

from fellrec.errors import BackboneError
from fellrec.models.adapters import LoraAdapter
from fellrec.models.architectures import arch_of
from fellrec.models.remote import Cut, server_shell
from fellrec.models.split import SplitModel

LLAMA = CONFIGS["llama"].to_dict()


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    if name in CONFIGS:
        return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    return AutoModel.from_config(ENCODERS[name], **WITHOUT_POOLER[name]).eval()


def attached(model: Any, **settings: Any) -> LoraAdapter:
    adapter, split = LoraAdapter(dropout=0.0, **settings), SplitModel(model, 2, 1)
    adapter.attach(model, split.arch, 0, split.part_of)
    return adapter


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "phi3", "gpt_neox", *ENCODERS])
def test_all_linear_adapts_what_peft_does(name: str) -> None:
    mine, theirs = model_of(name), model_of(name)
    adapter = attached(mine, target_modules="all-linear")
    wrapped = get_peft_model(theirs, LoraConfig(target_modules="all-linear"))
    expected = {key.removeprefix("base_model.model.") for key, _ in wrapped.named_parameters() if "lora_" in key}
    assert set(adapter.trainable(mine)) == expected


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("modules", [["norm", "lm_head"], ["embed_tokens"], ["mlp"]])
def test_what_is_trained_as_a_whole_is_saved_as_peft_saves_it(modules: list[str], tied: bool, tmp_path: Path) -> None:
    """Also where the LM head is the embedding: PEFT then loads a copy of it in each of the two places."""
    config, ids = LlamaConfig(**{**LLAMA, "tie_word_embeddings": tied}), torch.randint(3, 97, (3, 9))
    torch.manual_seed(0)
    model, fresh = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    fresh.load_state_dict(model.state_dict())
    adapter = attached(model, modules_to_save=modules)
    trained = adapter.trainable(model)
    assert all(parameter.requires_grad for parameter in trained.values())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapter.save(trained, None, dict, tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    again = AutoModelForCausalLM.from_config(config).eval()
    started = attached(again, modules_to_save=modules, path=str(tmp_path))
    assert all(torch.equal(parameter, trained[name]) for name, parameter in started.trainable(again).items())


def test_both_sides_of_a_cut_train_the_modules_of_a_whole_model() -> None:
    settings: dict[str, Any] = {"target_modules": "all-linear", "modules_to_save": ["norm", "input_layernorm"]}
    whole, model = model_of("llama"), model_of("llama")
    expected = attached(whole, **settings).trainable(whole)
    server, cut = server_shell(model, Cut(2, 1, 5)), SplitModel(model, 2, 1)
    body = LoraAdapter(dropout=0.0, **settings)
    body.attach(server, arch_of(server.config), 0, cut.part_of)
    assert set(body.trainable(server)) == {name for name in expected if cut.part_of(name) == "body"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["head"]}, "modules_to_save: 'head' matches no module .* has lm_head"),
        ({"modules_to_save": ["q_proj"]}, "layers.0.self_attn.q_proj is in adapter.target_modules and in"),
        ({"modules_to_save": ["self_attn"]}, "is in adapter.target_modules and in adapter.modules_to_save"),
    ],
)
def test_modules_that_cannot_be_trained_as_a_whole_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        attached(model_of("llama"), **settings)


def test_what_all_layers_share_cannot_be_trained() -> None:
    with pytest.raises(BackboneError, match="'relative_attention_bias' is used by the layers of all parts"):
        attached(model_of("mpnet"), modules_to_save=["relative_attention_bias"])
