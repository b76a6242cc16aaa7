"""Several clients in one forward and backward pass, against one client after the other."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from fellrec.aggregation import AggregationCallback, FedAvg
from fellrec.config.compose import compose
from fellrec.errors import ConfigError
from fellrec.experiment.build import build_data, build_recommender, build_rule
from fellrec.experiment.federation import Federation, build_federation
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.records import Failed, Job, RoundRecord
from fellrec.federated.terms import LocalTerm, TermContext
from fellrec.models.times import PartTimes

JOINT = ["adapter=lora", "adapter.dropout=0.1", "aggregation=local", "trainer.max_local_steps=3",
         "trainer.num_rounds=9", "trainer.evaluate_every=9"]  # fmt: skip
"""Three clients; with the retrieval objective they have 3, 2 and 2 batches of up to 16 rows, the last with fewer."""


def federation(overrides: list[str], *more: str, rule: type[AggregationCallback] | None = None) -> Federation:
    config = compose([*overrides, *JOINT, *more])
    if rule is not None:
        config.aggregation = OmegaConf.create({"_target_": f"{rule.__module__}.{rule.__qualname__}"})
    return build_federation(config, build_recommender(config, build_data(config)))


def rounds(made: Federation, *callbacks: FederatedCallback, number: int = 2) -> list[RoundRecord]:
    loop = made.loop(callbacks)
    return [loop.run_round(round_index) for round_index in range(number)]


def assert_close(left: Mapping[str, Tensor], right: Mapping[str, Tensor], tolerance: float = 2e-6) -> None:
    """Each tensor to a relative error in norm."""
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        difference = torch.linalg.vector_norm((tensor - right[name]).double())
        assert difference <= tolerance * torch.linalg.vector_norm(tensor.double()), name


def assert_same_training(alone: Federation, joint: Federation, tolerance: float = 2e-6) -> None:
    """Losses, adapters, moments and own tensors of all rows after two rounds."""
    for left, right in zip(rounds(alone), rounds(joint), strict=True):
        for one, other in zip(left.trained, right.trained, strict=True):
            assert (one.row, one.num_steps, one.num_samples) == (other.row, other.num_steps, other.num_samples)
            assert other.loss == pytest.approx(one.loss, rel=tolerance)
            assert (other.start_loss is None) == (one.start_loss is None)
            assert (other.start_loss or 0.0) == pytest.approx(one.start_loss or 0.0, rel=tolerance)
    for row in range(alone.population.num_rows):
        assert_close(alone.population.bank.row(row), joint.population.bank.row(row), tolerance)
        assert_close(alone.population.optimizer_of(row), joint.population.optimizer_of(row), tolerance)
        assert_close(alone.population.tensors_of(row), joint.population.tensors_of(row), tolerance)


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("objective", ["retrieval", "generative"])
def test_clients_together_are_trained_as_one_after_the_other(
    tiny_overrides: list[str], objective: str, number: int
) -> None:
    """Batches, targets and steps differ between clients; with two at once the third is alone."""
    alone = federation(tiny_overrides, f"objective={objective}")
    joint = federation(tiny_overrides, f"objective={objective}", f"trainer.clients_per_step={number}")
    assert_same_training(alone, joint)


@pytest.mark.parametrize(
    "how",
    [
        ["objective.item_encoder=encoded", "objective.num_negatives=20"],
        ["objective.order=newest_first", "objective.pooling=mean"],
        ["trainer.accumulate_grad_batches=2", "trainer.batch_size=5", "trainer.max_local_steps=null"],
        ["trainer.gradient_clip=0.01", "trainer.warmup_steps=4", "trainer.learning_rate_decay=cosine"],
        ["adapter.target_modules=all-linear", "adapter.layers=body+tail", "split.head_layers=1"],
        ["trainer.local_epochs=2", "trainer.max_local_steps=null"],
    ],
    ids=lambda how: how[0],
)
def test_so_they_are_with_other_settings(tiny_overrides: list[str], how: list[str]) -> None:
    alone = federation(tiny_overrides, *how)
    assert_same_training(alone, federation(tiny_overrides, *how, "trainer.clients_per_step=3"))


class Pull(LocalTerm):
    """A proximal term, and the mean of the gradients as a tensor of the client."""

    def loss(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Tensor:
        return sum((0.5 * (v - context.received[k]).square().sum() for k, v in parameters.items()), torch.tensor(0.0))

    def correct(self, gradients: Mapping[str, Tensor], context: TermContext) -> None:
        sums = context.kept.setdefault("sum", {})
        for name, gradient in gradients.items():
            sums[name] = sums.get(name, torch.zeros_like(gradient)) + gradient

    def finish(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Mapping[str, Any]:
        return {"own": {name: value / context.num_steps for name, value in context.kept["sum"].items()}}


class Seams(FedAvg):
    """A local term, start losses, and in the second round only B is trained."""

    needs_start_loss = True
    local_terms = (Pull(),)

    def trains(self, name: str, round_index: int) -> bool:
        return round_index == 0 or "lora_B" in name


def test_terms_start_losses_and_trained_names_are_those_of_each_client(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    alone, joint = (federation(tiny_overrides, f"trainer.clients_per_step={number}", rule=Seams) for number in (1, 3))
    assert_same_training(alone, joint)


class Seen(FederatedCallback):
    """Which clients began, and how many steps were taken."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.losses: list[float] = []

    def on_client_start(self, job: Job) -> None:
        self.begun.append(job.client)

    def on_step_end(self, loss: float) -> None:
        self.losses.append(loss)


def test_callbacks_see_every_step_of_every_client(tiny_overrides: list[str]) -> None:
    found = []
    for number in (1, 3):
        seen = Seen()
        rounds(federation(tiny_overrides, f"trainer.clients_per_step={number}"), seen, number=1)
        found.append(seen)
    assert sorted(found[0].begun) == sorted(found[1].begun) == [0, 1, 2]
    assert sorted(found[1].losses) == pytest.approx(sorted(found[0].losses), rel=1e-6)


def test_a_profile_sees_the_parts_and_tokens_of_all_clients(tiny_overrides: list[str]) -> None:
    """Rows of all clients are padded to one length; the tokens in them are the same."""
    found = []
    for number in (1, 3):
        made, times = federation(tiny_overrides, f"trainer.clients_per_step={number}"), PartTimes(torch.device("cpu"))
        made.executor.trainer.module.model.times = times  # type: ignore[attr-defined]
        rounds(made, number=1)
        found.append(times)
    alone, joint = found
    assert joint.num_inside == alone.num_inside > 0
    assert joint.num_tokens > alone.num_tokens
    assert joint.seconds.keys() == alone.seconds.keys() >= {"data", "head", "logits", "optimiser"}


def broken(joint: Federation, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Change the loss of whichever client has the most targets in the second step."""
    trainer = joint.executor.trainer  # type: ignore[attr-defined]
    loss_of, calls = trainer.module.objective.loss_of, list[int]()

    def changed(model: object, hidden: list[Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        calls.append(1)
        total, count = loss_of(model, hidden, batch)
        return (change(total) if len(calls) == 4 else total), count

    monkeypatch.setattr(trainer.module.objective, "loss_of", changed)


def out_of_memory(loss: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("out of memory\nTried to allocate")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda loss: loss * float("nan"), r"client 0 became nan in round 0, local step 1"),
        (out_of_memory, r"client 0 failed in round 0 with OutOfMemoryError: out of memory \("),
    ],
    ids=["nan", "error"],
)
def test_a_client_that_fails_leaves_the_others_untouched(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor], reason: str
) -> None:
    """The fourth loss is that of client 0, which has the most steps and so comes first, in its second step.

    Its rows are padded, and the others' too: gradients that are not numbers would reach them by a product with 0.
    """
    how = ["trainer.clients_per_step=3", "participation.on_failure=skip", "objective=generative"]
    whole, joint = federation(tiny_overrides, *how), federation(tiny_overrides, *how)
    expected = rounds(whole, number=1)[0]
    broken(joint, monkeypatch, change)
    (found,) = rounds(joint, number=1)
    (failed,) = found.failed
    assert failed.row == 0
    assert re.search(reason, failed.reason)
    assert [trained.row for trained in found.trained] == [1, 2]
    for one, other in zip(expected.trained[1:], found.trained, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert_close(one.adapter.tensors(), other.adapter.tensors(), 1e-6)
        assert_close(one.optimizer.tensors(), other.optimizer.tensors(), 1e-6)


def test_a_pass_that_fails_fails_all_of_its_group(tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three clients two are in a group, the one with the most steps among them; the third trains."""
    joint = federation(tiny_overrides, "trainer.clients_per_step=2")
    trainer = joint.executor.joint  # type: ignore[attr-defined]
    monkeypatch.setattr(trainer.lora, "encode", lambda *_: out_of_memory(torch.tensor(0.0)))
    outcomes = joint.loop().train([joint.population.job(row, 0) for row in range(3)])
    failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    assert [outcome.row for outcome in failed] == [0, 1]
    for outcome in failed:
        assert re.search(
            r"client 0, client 1 failed in round 0 with OutOfMemoryError: out of memory \(", outcome.reason
        )


def test_a_resumed_run_equals_an_uninterrupted_one(tiny_overrides: list[str], tmp_path: Path) -> None:
    """In this process a group gives the same bits again."""
    how = ["trainer.clients_per_step=2", "aggregation=fedavg"]
    whole, first, second = (federation(tiny_overrides, *how) for _ in range(3))
    rounds(whole)
    rounds(first, number=1)
    CheckpointFolder(tmp_path).save(first.persisted, 1)
    CheckpointFolder(tmp_path).load(second.persisted)
    second.loop().run_round(1)
    for row in range(3):
        assert_close(whole.population.bank.row(row), second.population.bank.row(row), 0.0)
        assert_close(whole.population.optimizer_of(row), second.population.optimizer_of(row), 0.0)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["adapter=full"], "needs adapter=lora, it is fellrec.models.adapters.FullAdapter"),
        (["adapter=lora_sb"], "needs adapter=lora, it is .*LoraSBAdapter"),
        (["adapter=lora_mixed", "aggregation=fedalt"], "needs adapter=lora, it is .*LoraMixedAdapter"),
        (["adapter.modules_to_save=[norm]"], r"needs adapter.modules_to_save=\[\], it is \['norm'\]"),
        (["split=executed"], "needs split.transport=none, it is inprocess"),
        (["backbone=hf", "backbone.path=x", "backbone.quantize=8bit"], "needs backbone.quantize=null, it is 8bit"),
        (["trainer.devices=2", "trainer.devices_per_client=2"], "needs trainer.devices_per_client=1, it is 2"),
        (["trainer.precision=16-mixed"], "needs another trainer.precision than 16-mixed"),
        (["aggregation=apfl"], "is not available with aggregation=apfl, whose clients train a second model"),
        (
            ["objective.item_encoder=encoded", "objective.refresh_items=2"],
            "is not available with objective.refresh_items=2",
        ),
        (
            ["objective.item_encoder=encoded", "objective.freeze_items_after=1"],
            "is not available with objective.freeze_items_after=1",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_is_not_available_is_refused_from_the_settings(overrides: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"^trainer.clients_per_step=3 {problem}"):
        build_rule(compose(["adapter=lora", "trainer.clients_per_step=3", *overrides]))
    build_rule(compose(["adapter=lora", *overrides]))
