"""``fellrec plan`` for encoders: counts compared with real models, activations and FLOPs with a real forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import ENCODERS, WITHOUT_POOLER
from torch import Tensor
from transformers import AutoModel, LongformerConfig, RobertaConfig

from fellrec.cli.main import main
from fellrec.functional.cost import total_cost
from fellrec.models.adapters import FullAdapter, LoraAdapter, adapter_bytes
from fellrec.models.architectures import ARCHITECTURES
from fellrec.models.split import SplitModel
from fellrec.planning.measure import bytes_of_parts, measure_parts, trace


class FirstToken:
    """A loss on the first token's hidden state."""

    def inputs(self, batch: dict[str, Tensor]) -> list[Tensor]:
        return [batch["input_ids"]]

    def loss_of(self, model: SplitModel, hidden: list[Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return hidden[0][:, 0].square().sum(), len(hidden[0])


OBJECTIVE: Any = FirstToken()
BATCH = {"input_ids": (torch.arange(2 * 60) % 97).reshape(2, 60)}


def built(name: str, device: str) -> SplitModel:
    with torch.device(device):
        model = AutoModel.from_config(ENCODERS[name], dtype=torch.float32, **WITHOUT_POOLER[name])
    return SplitModel(model, 2, 1)


def test_every_encoder_is_covered() -> None:
    assert set(ENCODERS) == {name for name, arch in ARCHITECTURES.items() if not arch.is_causal}


@pytest.mark.parametrize("kind", [LoraAdapter, FullAdapter])
@pytest.mark.parametrize("name", ENCODERS)
def test_counts_equal_those_of_a_real_model(name: str, kind: type) -> None:
    found, real = measure_parts(built(name, "meta"), kind(), OBJECTIVE, BATCH), built(name, "cpu")
    parts = bytes_of_parts(real, dict(real.model.named_parameters()))
    assert {part: cost.weight_bytes for part, cost in found.items()} == parts
    assert sum(parts.values()) == real.model.get_memory_footprint(return_buffers=False)
    adapter = kind()
    adapter.attach(real.model, real.arch, 0, real.part_of)
    assert total_cost(found.values()).adapter_bytes == adapter_bytes(adapter.trainable(real.model))
    assert [cost.num_layers for cost in found.values()] == [2, 2, 1]


@pytest.mark.parametrize("kind", [LoraAdapter, FullAdapter])
@pytest.mark.parametrize("name", ENCODERS)
def test_activations_are_those_of_a_real_forward_pass(name: str, kind: Any) -> None:
    """60 tokens, which a Longformer pads to 64; one token per row is global."""
    saved = []
    for device in ("meta", "cpu"):
        model, adapter = built(name, device), kind()
        adapter.attach(model.model, model.arch, 0, model.part_of)
        found = trace(model, OBJECTIVE, BATCH)
        saved.append([part.saved_bytes for part in found.values()])
        if name == "longformer":  # the FLOP counter does not see the fused CPU kernels of the others
            saved[-1] += [part.flops for part in found.values()]
    # The CPU's kernel saves the mask of ModernBERT's windows in float32, where the plan has it in bool.
    assert saved[0] == pytest.approx(saved[1], rel=0.08 if name == "modernbert" else 0.02)


def test_compute_is_two_operations_per_weight_and_token() -> None:
    """A layer of a BERT has 4 D² + 2 D F weights in matrices; attention adds 2 · 2 · B · L² · D."""
    found = measure_parts(built("bert", "meta"), FullAdapter(), OBJECTIVE, BATCH)
    rows, length = BATCH["input_ids"].shape
    layer = 2 * rows * length * (4 * 32 * 32 + 2 * 32 * 48) + 4 * rows * length**2 * 32
    assert [cost.forward_flops for cost in found.values()] == [2 * layer, 2 * layer, layer]


PUBLISHED = {
    "roberta": (RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1), 124_645_632),
    "longformer": (LongformerConfig(vocab_size=50265, max_position_embeddings=4098, type_vocab_size=1), 148_659_456),
}
"""roberta-base and longformer-base-4096, including the pooler."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_plan_counts_a_published_model(
    name: str, tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The published count includes the pooler's D² + D parameters, which are not used here."""
    config, published = PUBLISHED[name]
    config.save_pretrained(tmp_path)
    overrides = [item for item in tiny_overrides if not item.startswith("backbone.")]
    given = [*overrides, "backbone=hf", f"backbone.config={tmp_path}", "objective=retrieval", "adapter=full"]
    main(["plan", *given, "--format", "json"])
    (plan,) = json.loads(capsys.readouterr().out)
    assert plan["num_parameters"] == published - (768 * 768 + 768)
    assert plan["client"]["weight_bytes"] + plan["server"]["weight_bytes"] == 4 * plan["num_parameters"]
