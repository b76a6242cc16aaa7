"""Adapters with frozen outer factors: what a layer computes, its initialisation, export, parts of a model, refusals."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from small_models import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fellrec.errors import BackboneError, ConfigError
from fellrec.models.architectures import arch_of
from fellrec.models.core_adapters import LoraHeadsAdapter, LoraSBAdapter
from fellrec.models.core_layer import CoreLayer
from fellrec.models.remote import Cut, server_shell
from fellrec.models.split import SplitModel

IDS = torch.arange(3, 30).reshape(3, 9)
KINDS = {"lora_sb": (LoraSBAdapter, {"rank": 4, "alpha": 6}), "lora_heads": (LoraHeadsAdapter, {"rank": 2, "alpha": 5})}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def attached(model: Any, kind: str, seed: int = 0, **settings: Any) -> Any:
    made, given = KINDS[kind]
    adapter, split = made(**{**given, **settings}), SplitModel(model, 2, 1)
    adapter.attach(model, split.arch, seed, split.part_of)
    model.eval()
    return adapter


def disturb(adapter: Any, model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.trainable(model).values():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def layer_of(base: nn.Module, num_heads: int, rank: int, has_scales: bool) -> CoreLayer:
    how: dict[str, Any] = {"seed": 0, "num_heads": num_heads, "rank": rank, "scale": 1.5, "dropout": 0.0}
    return CoreLayer(base, "x", **how, has_scales=has_scales)


@pytest.mark.parametrize(
    ("base", "size_in"), [(nn.Linear(7, 9), 7), (nn.Linear(9, 7, bias=False), 9), (Conv1D(9, 7), 7)], ids=str
)
@pytest.mark.parametrize(("num_heads", "has_scales"), [(1, False), (3, True)])
def test_a_layer_adds_the_sum_over_its_heads(base: nn.Module, size_in: int, num_heads: int, has_scales: bool) -> None:
    """``W x + s Σ s_i B_i H_i A_i x`` in NumPy, head by head; A and B have orthonormal rows and columns."""
    layer, x = layer_of(base, num_heads, 2, has_scales), torch.randn(4, size_in)
    with torch.no_grad():
        layer.lora_cores.normal_()
        if layer.lora_scales is not None:
            layer.lora_scales.normal_()
    a, b, cores = (t.detach().double().numpy() for t in (layer.frozen_a, layer.frozen_b, layer.lora_cores))
    scales = np.ones(num_heads) if layer.lora_scales is None else layer.lora_scales.detach().numpy()
    expected = base(x).detach().double().numpy()
    for head in range(num_heads):
        rows = slice(2 * head, 2 * head + 2)
        expected = expected + 1.5 * scales[head] * x.double().numpy() @ (b[:, rows] @ cores[head] @ a[rows]).T
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(a @ a.T, np.eye(2 * num_heads), atol=1e-6)
    np.testing.assert_allclose(b.T @ b, np.eye(2 * num_heads), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_starts_as_the_backbone_and_depends_on_the_seed_only(kind: str) -> None:
    model, same, other = (model_of("llama") for _ in range(3))
    before, state = logits(model), torch.get_rng_state()
    adapters = [attached(m, kind, seed) for m, seed in ((model, 3), (same, 3), (other, 4))]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(logits(model), before)
    for adapter, m in zip(adapters, (model, same, other)):
        disturb(adapter, m)
    assert torch.equal(logits(model), logits(same))
    assert not torch.equal(logits(model), logits(other))
    trained = adapters[0].trainable(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained)
    assert {name.rpartition(".")[2] for name in trained} <= {"lora_cores", "lora_scales"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "more", [{}, {"target_modules": "all-linear"}, {"layers": "body+tail", "modules_to_save": ["lm_head"]}], ids=str
)
def test_peft_loads_an_export_with_the_same_logits(kind: str, name: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Llama's Linear and GPT-2's Conv1D, rectangular ones among them."""
    model, fresh = model_of(name), model_of(name)
    adapter = attached(model, kind, **more)
    disturb(adapter, model)
    adapter.save(dict(adapter.trainable(model)), SimpleNamespace(model=model), dict, tmp_path)
    assert (logits(fresh) - logits(model)).abs().max() > 1e-2
    found = logits(PeftModel.from_pretrained(fresh, tmp_path).eval())
    torch.testing.assert_close(found, logits(model), rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_both_sides_of_a_cut_have_the_factors_of_a_whole_model(kind: str) -> None:
    whole, model = model_of("llama"), model_of("llama")
    expected = attached(whole, kind)
    server, cut = server_shell(model, Cut(2, 1, 5)), SplitModel(model, 2, 1)
    made, given = KINDS[kind]
    body = made(**given)
    body.attach(server, arch_of(server.config), 0, cut.part_of)
    assert set(body.trainable(server)) == {n for n in expected.trainable(whole) if cut.part_of(n) == "body"}
    frozen = {name: p for name, p in server.named_parameters() if "frozen_" in name}
    assert frozen
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in frozen.items())


def test_an_adapter_can_be_switched_off_and_is_float32_beside_bfloat16() -> None:
    model = model_of("llama").bfloat16()
    before = logits(model)
    adapter = attached(model, "lora_heads")
    disturb(adapter, model)
    assert {p.dtype for p in adapter.trainable(model).values()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    assert not torch.equal(logits(model), before)
    with SplitModel(model, 2, 1).without_lora():
        assert torch.equal(logits(model), before)


def test_dropout_is_on_the_input_of_the_adapter_in_training_only() -> None:
    layer = CoreLayer(nn.Linear(8, 8), "x", seed=0, num_heads=1, rank=8, scale=1.0, dropout=0.5, has_scales=False)
    with torch.no_grad():
        layer.lora_cores.copy_(torch.eye(8))
    x = torch.ones(1000, 8)
    added = layer(x) - layer.base_layer(x)
    assert added.std(dim=0).min() > 0.1
    kept = layer.eval()(x) - layer.base_layer(x)
    assert kept.std(dim=0).max() < 1e-6
    torch.testing.assert_close(added.mean(dim=0), kept[0], rtol=0, atol=0.2)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("lora_sb", {"rank": 17}, "adapter.rank=17 is not allowed: model.layers.0.self_attn.v_proj has 16 outputs"),
        ("lora_heads", {"rank": 5}, "adapter.rank=5 with adapter.num_heads=4 is not allowed: .* heads is at most 16"),
        ("lora_sb", {"target_modules": ["q_prj"]}, "'q_prj' matches no module of the backbone; it has q_proj"),
    ],
)
def test_what_does_not_fit_the_backbone_is_named(kind: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BackboneError, match=message):
        attached(model_of("llama"), kind, **settings)


@pytest.mark.parametrize("settings", [{"rank": 0}, {"rank": [2, 4]}, {"alpha": 0}, {"num_heads": 0}, {"dropout": 1.0}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"adapter.{next(iter(settings))}=.* is not allowed"):
        LoraHeadsAdapter(**settings)
