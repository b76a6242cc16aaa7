"""Head, body and tail, and adapters saved for PEFT, are bit-identical to the whole model for every architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from small_models import CONFIGS, ENCODERS, LAYERS, masks
from transformers import AutoModelForCausalLM

from fellrec.models.adapters import LoraAdapter
from fellrec.models.architectures import ARCHITECTURES, arch_of
from fellrec.models.backbone import load_hf
from fellrec.models.split import SplitModel
from fellrec.models.tiny import build_tokenizer


def gradients(model: torch.nn.Module, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_architecture_is_tested() -> None:
    assert set(ARCHITECTURES) == {config.model_type for config in (*CONFIGS.values(), *ENCODERS.values())}


@pytest.mark.parametrize("mask", ["none", "left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_forward_and_every_gradient_are_exact(name: str, mask: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    ids, attention_mask = torch.randint(3, 97, (3, 9)), masks()[mask]
    whole = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).logits
    expected = gradients(model, whole)
    assert len(expected) > LAYERS
    for head, tail in [(0, 0), (1, 1), (2, 3), (LAYERS, 0), (0, LAYERS), (3, 1)]:
        split = SplitModel(model, head, tail)
        logits = split.lm_head(split(ids, attention_mask))
        assert torch.equal(logits, whole), (head, tail)
        found = gradients(model, logits)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), (head, tail)


@pytest.mark.parametrize("name", CONFIGS)
def test_dropout_draws_the_same_numbers(name: str) -> None:
    config = CONFIGS[name].__class__(**{**CONFIGS[name].to_dict(), **_dropout(name)})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    split, ids = SplitModel(model, 2, 1).train(), torch.randint(3, 97, (3, 9))
    torch.manual_seed(1)
    whole = model(input_ids=ids, use_cache=False).logits
    torch.manual_seed(1)
    assert torch.equal(split.lm_head(split(ids)), whole)
    torch.manual_seed(2)
    assert not torch.equal(split.lm_head(split(ids)), whole), "dropout is on"


def _dropout(name: str) -> dict[str, float]:
    if name == "gpt2":
        return {"embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2}
    more = {"gpt_neox": ["hidden_dropout"], "opt": ["dropout"], "phi3": ["resid_pdrop"]}.get(name, [])
    return dict.fromkeys(["attention_dropout", *more], 0.2)


@pytest.mark.parametrize("name", CONFIGS)
def test_parts_own_all_parameters_under_their_own_names(name: str) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[name])
    split = SplitModel(model, 2, 1)
    parts = split.part_of_parameter()
    assert list(parts) == [name for name, _ in model.named_parameters()]
    arch = split.arch
    for layer, part in enumerate(["head", "head", "body", "body", "tail"]):
        prefix = f"{arch.inner}.{arch.layers}.{layer}."
        assert {parts[key] for key in parts if key.startswith(prefix)} == {part}
    assert len(list(split.parameters())) == len(list(model.parameters())), "nothing is listed twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_lora_is_exact_through_the_cuts_and_through_peft(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype).eval()
    fresh = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype).eval()
    fresh.load_state_dict(model.state_dict())
    split, adapter, ids = SplitModel(model, 2, 1), LoraAdapter(dropout=0.0), torch.randint(3, 97, (3, 9))
    base = model(input_ids=ids, use_cache=False).logits
    adapter.attach(model, arch_of(model.config), 0, split.part_of)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, base), "B starts at zero"
    parameters = adapter.trainable(model)
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(std=0.1)
    adapter.save(adapter.trainable(model), None, dict, tmp_path)
    whole = model(input_ids=ids, use_cache=False).logits
    assert not torch.equal(whole, base)
    assert torch.equal(split.eval().lm_head(split(ids)), whole)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(loaded(input_ids=ids, use_cache=False).logits, whole)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_loads_from_its_folder(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    model.save_pretrained(tmp_path)
    build_tokenizer(["a"], vocab_size=259).save_pretrained(tmp_path)
    loaded, ids = load_hf(str(tmp_path)), torch.randint(3, 97, (3, 9))
    assert loaded.arch == ARCHITECTURES[CONFIGS[name].model_type]
    assert torch.equal(loaded.model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize(("head", "tail"), [(3, 3), (-1, 0), (0, 6)])
def test_a_split_deeper_than_the_model_is_refused(head: int, tail: int) -> None:
    from fellrec.errors import BackboneError

    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    with pytest.raises(BackboneError, match=f"split.head_layers={head} and split.tail_layers={tail} do not fit.* 5"):
        SplitModel(model, head, tail)
