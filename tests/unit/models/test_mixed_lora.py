"""Two LoRA adapters and a router: what a layer computes, its start, parts of a model, what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_models import CONFIGS
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from fellrec.models.architectures import arch_of
from fellrec.models.mixed_lora import LoraMixedAdapter, MixedLoraLayer
from fellrec.models.remote import Cut, server_shell
from fellrec.models.split import SplitModel

IDS = torch.arange(3, 30).reshape(3, 9)


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name]).eval()


def attached(model: Any, seed: int = 0) -> LoraMixedAdapter:
    adapter, split = LoraMixedAdapter(rank=2, alpha=5), SplitModel(model, 2, 1)
    adapter.attach(model, split.arch, seed, split.part_of)
    model.eval()
    return adapter


def disturb(parameters: dict[str, nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize(("base", "size_in"), [(nn.Linear(7, 9), 7), (Conv1D(9, 7), 7)], ids=str)
def test_a_router_mixes_both_for_every_token(base: nn.Module, size_in: int) -> None:
    """``W x + s (g1 B_own A_own x + g2 B_rest A_rest x)``, ``g = softmax(G x)``, in NumPy, token by token."""
    layer, x = MixedLoraLayer(base, "x", seed=0, rank=2, scale=1.5, dropout=0.0), torch.randn(4, 3, size_in)
    disturb({name: p for name, p in layer.named_parameters() if "lora_" in name})
    own_a, own_b, rest_a, rest_b, router = (
        p.detach().double().numpy()
        for p in (layer.lora_own_a, layer.lora_own_b, layer.lora_rest_a, layer.lora_rest_b, layer.lora_router)
    )
    expected = base(x).detach().double().numpy()
    for place in np.ndindex(4, 3):
        token = x[place].double().numpy()
        gates = np.exp(router @ token) / np.exp(router @ token).sum()
        expected[place] += 1.5 * (gates[0] * own_b @ own_a @ token + gates[1] * rest_b @ rest_a @ token)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-5)


def test_it_starts_as_the_backbone_counts_both_alike_and_depends_on_the_seed_only() -> None:
    model, same, other = (model_of("llama") for _ in range(3))
    before = logits(model)
    trained = [attached(m, seed).trainable(m) for m, seed in ((model, 3), (same, 3), (other, 4))]
    assert torch.equal(logits(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(trained[0])
    assert not any(p.any() for name, p in trained[0].items() if name.endswith(("_b", "router")))
    for parameters in trained:
        disturb(parameters)
    assert torch.equal(logits(model), logits(same))
    assert not torch.equal(logits(model), logits(other))
    with SplitModel(model, 2, 1).without_lora():
        assert torch.equal(logits(model), before)


def test_both_sides_of_a_cut_have_the_parameters_of_a_whole_model() -> None:
    whole, model = model_of("gpt2"), model_of("gpt2")
    expected = attached(whole).trainable(whole)
    server, cut = server_shell(model, Cut(2, 1, 5)), SplitModel(model, 2, 1)
    body = LoraMixedAdapter(rank=2, alpha=5)
    body.attach(server, arch_of(server.config), 0, cut.part_of)
    found = body.trainable(server)
    assert set(found) == {name for name in expected if cut.part_of(name) == "body"}
    assert all(torch.equal(parameter, expected[name]) for name, parameter in found.items())


def test_tensors_and_settings_are_written_as_they_are(tmp_path: Path) -> None:
    model = model_of("llama")
    adapter = attached(model)
    disturb(adapter.trainable(model))
    adapter.save(adapter.trainable(model), None, dict, tmp_path)
    saved = load_file(tmp_path / "lora_mixed.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in adapter.trainable(model).items())
    assert json.loads((tmp_path / "lora_mixed.json").read_text())["alpha"] == 5
