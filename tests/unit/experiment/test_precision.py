"""Every setting of number types has its effect, or is refused before anything expensive starts."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import nn
from torch.amp import GradScaler

from fellrec.cli.evaluate import evaluate
from fellrec.cli.main import main
from fellrec.config.compose import compose
from fellrec.errors import ConfigError
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.fabric import build_fabric
from fellrec.experiment.federation import build_loop
from fellrec.experiment.precision import check_precision, weights_dtype
from fellrec.federated.slot import LocalSlot
from fellrec.federated.slot_state import SlotState
from fellrec.planning.shape import empty_backbone

SHORT = ["trainer.num_rounds=1", "trainer.max_local_steps=2"]


class Scaled(MixedPrecision):
    """A scaled loss in float32: scales are powers of two, so scaling and its inverse are exact."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu")

    def forward_context(self) -> Any:
        return nullcontext()


def built(overrides: list[str], *more: str, fabric: Fabric | None = None) -> Recommender:
    config = compose([*overrides, *SHORT, *more])
    return build_recommender(config, build_data(config), fabric)


def adapters(overrides: list[str], *more: str, fabric: Fabric | None = None) -> dict[str, torch.Tensor]:
    config = compose([*overrides, *SHORT, *more])
    loop = build_loop(config, build_recommender(config, build_data(config), fabric))
    loop.run()
    return loop.population.bank.tensors


def frozen_bytes(recommender: Recommender) -> int:
    trainable = recommender.module.trainable
    parameters = recommender.backbone.model.named_parameters()
    return sum(p.numel() * p.element_size() for name, p in parameters if name not in trainable)


@pytest.mark.parametrize("backbone", ["tiny", "sasrec"])
def test_bf16_true_halves_the_weights_and_keeps_lora_in_float32(tiny_overrides: list[str], backbone: str) -> None:
    given = [item for item in tiny_overrides if backbone == "tiny" or not item.startswith("backbone.")]
    config = [*given, f"backbone={backbone}", "adapter=lora"]
    full, half = built(config), built(config, "trainer.precision=bf16-true")
    assert 2 * frozen_bytes(half) == frozen_bytes(full)
    assert {p.dtype for p in half.module.trainable.values()} == {torch.float32}
    planned, _ = empty_backbone(compose([*config, "trainer.precision=bf16-true"]), half.data.catalogue)
    assert planned.model.dtype == torch.bfloat16, "the plan counts the same weights"


def test_bf16_true_changes_the_result_and_is_the_same_through_the_cut(tiny_overrides: list[str]) -> None:
    half = ["adapter=lora", "trainer.precision=bf16-true"]
    full, whole = adapters(tiny_overrides, "adapter=lora"), adapters(tiny_overrides, *half)
    assert any(not torch.equal(full[name], whole[name]) for name in full)
    cut = adapters(tiny_overrides, *half, "split.transport=inprocess", "split.tail_layers=0")
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_a_scaled_loss_gives_the_bits_of_an_unscaled_one(tiny_overrides: list[str]) -> None:
    given = ["adapter=lora", "aggregation=local", "trainer.accumulate_grad_batches=2"]
    expected = adapters(tiny_overrides, *given)
    found = adapters(tiny_overrides, *given, fabric=Fabric(accelerator="cpu", devices=1, plugins=[Scaled()]))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("scale", "after", "norm"),
    [(2.0**16, -3.0, 32**0.5), (2.0**127, 1.0, float("inf"))],  # 4 · 2^127 is not finite in float32
)
def test_a_step_that_overflows_is_left_out_and_the_scale_falls(scale: float, after: float, norm: float) -> None:
    weight = nn.Parameter(torch.ones(2))
    slot = LocalSlot({"w": weight}, SlotState({"w": weight.detach()}), torch.optim.SGD([weight], lr=1.0))
    slot.scaler = GradScaler("cpu", init_scale=scale)
    slot.scaler.scale((weight * 4).sum()).backward()
    assert slot.norms()["w"] == pytest.approx(norm)
    slot.step(1.0, 1.0)
    assert weight.tolist() == [after, after]
    assert slot.scaler.get_scale() == (scale if after == -3.0 else scale / 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["trainer.precision=16-mixed"], "trainer.precision=16-mixed needs a GPU, and this run is on cpu; give bf16"),
        (["trainer.precision=16-mixed", "split=executed"], "16-mixed needs split.transport=none, it is inprocess"),
        (["split.hidden_dtype=int8"], "split.hidden_dtype=int8 has no effect with split.transport=none"),
        (["split.hidden_noise=0.1"], "split.hidden_noise=0.1 has no effect with split.transport=none"),
        (["split.gradient_dtype=bfloat16"], "split.gradient_dtype=bfloat16 has no effect"),
        (["backbone=hf", "backbone.path=x", "backbone.dtype=float16", "adapter=full"], "float16 needs adapter=lora"),
    ],
)
def test_types_that_do_not_fit_are_refused_by_name(more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_fabric(compose(more))


def test_float16_weights_and_bf16_true_exclude_each_other() -> None:
    hf = ["backbone=hf", "backbone.path=x"]
    with pytest.raises(ConfigError, match="bf16-true and backbone.dtype=float16 exclude each other"):
        weights_dtype(compose([*hf, "backbone.dtype=float16", "trainer.precision=bf16-true"]))
    assert weights_dtype(compose([*hf, "trainer.precision=bf16-true"])) == "bfloat16"
    assert weights_dtype(compose([*hf, "backbone.dtype=float16"])) == "float16"


def test_a_gpu_may_train_in_half_precision() -> None:
    check_precision(compose(["trainer.precision=16-mixed"]), torch.device("cuda"))


@pytest.mark.slow
def test_evaluate_rounds_hidden_states_as_the_run_did_with_the_same_noise(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    where = [f"run_dir={tmp_path / 'run'}", f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"]
    rounded = [
        "split.transport=inprocess",
        "split.tail_layers=0",
        "split.hidden_dtype=int8",
        "split.hidden_noise=0.5",
        "references.show=[popularity]",
    ]
    main(["train", *tiny_overrides, *SHORT, *rounded, *where])
    expected = json.loads((tmp_path / "run" / "results.json").read_text())["summary"]
    evaluation = evaluate(tmp_path / "run", "test").results[0].evaluation
    assert evaluation.summary["ndcg_at_10/mean"] == expected["ndcg_at_10/mean"]
