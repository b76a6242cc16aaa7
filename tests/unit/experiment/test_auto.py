"""``auto`` chooses what is faster among what computes the same, and the choice is part of the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fellrec.config.compose import compose
from fellrec.config.stored import read_config
from fellrec.experiment import auto
from fellrec.experiment.auto import Candidate, Measured, choose, chosen, measure, precisions, select
from fellrec.experiment.build import Recommender, build_data, build_recommender
from fellrec.experiment.fabric import build_fabric
from fellrec.experiment.federation import build_loop
from fellrec.experiment.precision import use_precision
from fellrec.experiment.run import build

AUTO = ["trainer.precision=auto", "trainer.attention=auto"]
SHORT = ["trainer.num_rounds=1", "trainer.max_local_steps=2", "tracking.uri=null"]
CPU = torch.device("cpu")
MIXED = Candidate("bf16-mixed", "eager")


def of(seconds: float, loss: float, precision: str = "bf16-mixed") -> Measured:
    return Measured(Candidate(precision, "sdpa"), seconds, loss)


@pytest.fixture
def fast_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that multiplies matrices faster in bfloat16."""
    monkeypatch.setattr(auto, "_is_fast_in_bf16", lambda device: True)


def test_the_reference_is_kept_unless_a_candidate_of_the_same_loss_saves_enough() -> None:
    reference = of(1.0, 4.0, "32-true")
    assert select([reference, of(0.97, 4.0)]) is reference, "3 % may be chance"
    assert select([reference, of(0.5, 4.03)]) is reference, "0.75 % off"
    assert select([reference, of(0.5, float("nan"))]) is reference
    assert select([reference, slow := of(0.9, 4.01), of(0.3, 3.0), fast := of(0.6, 3.99)]) is fast
    assert select([reference, slow]) is slow


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trainer.precision=auto"], ["32-true", "bf16-mixed"]),
        (["trainer.precision=auto", "adapter=lora"], ["32-true", "bf16-mixed", "bf16-true"]),
        (["trainer.precision=auto", "adapter=lora", "adapter.modules_to_save=[norm]"], ["32-true", "bf16-mixed"]),
        (["trainer.precision=bf16-mixed"], ["bf16-mixed"]),
        (
            ["trainer.precision=auto", "adapter=lora", "backbone=hf", "backbone.path=x", "backbone.dtype=bfloat16"],
            ["32-true"],
        ),
    ],
)
@pytest.mark.usefixtures("fast_bf16")
def test_no_trained_weight_is_rounded(overrides: list[str], expected: list[str]) -> None:
    assert precisions(compose(overrides), CPU) == expected


def test_bfloat16_is_not_tried_where_its_products_are_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 60e9, torch.bfloat16: 2e9}
    monkeypatch.setattr(auto, "matrix_rate", lambda device, dtype, size, repeats: rates[dtype])
    assert precisions(compose(["trainer.precision=auto", "adapter=lora"]), CPU) == ["32-true"]


def adapters(recommender: Recommender, overrides: list[str]) -> dict[str, torch.Tensor]:
    loop = build_loop(compose(overrides), recommender)
    loop.run()
    return loop.population.bank.tensors


@pytest.mark.usefixtures("fast_bf16")
def test_a_run_computes_what_it_computes_with_the_choice_given(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits: a measurement draws no number of the run, and Fabric's later precision is that of its start."""
    monkeypatch.setattr(auto, "select", lambda measured: next(m for m in measured if m.candidate == MIXED))
    given = [*tiny_overrides, *SHORT, "adapter=lora"]
    config = compose([*given, *AUTO])
    data, fabric = build_data(config), build_fabric(config)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    (resolved,) = choose([config], data)
    assert torch.equal(torch.get_rng_state(), before)
    assert (resolved.trainer.precision, resolved.trainer.attention) == ("bf16-mixed", "eager")
    explicit = [*given, "trainer.precision=bf16-mixed", "trainer.attention=eager"]
    expected = adapters(build_recommender(compose(explicit), data), explicit)
    found = adapters(build_recommender(resolved, data, fabric), explicit)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    plain = adapters(build_recommender(compose(given), data), given)
    assert any(not torch.equal(plain[name], expected[name]) for name in expected)


def test_the_choice_is_in_the_configuration_of_the_run_and_another_run_of_it_measures_nothing(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = compose([*tiny_overrides, *SHORT, *AUTO, f"run_dir={tmp_path}/run"])
    build(config).execute()
    assert "trainer.precision=auto, trainer.attention=auto: " in capsys.readouterr().err
    stored = read_config(tmp_path / "run")
    assert "auto" not in (stored.trainer.precision, stored.trainer.attention)
    monkeypatch.setattr(auto, "_measured_choice", None)
    assert choose([stored], build_data(config)) == [stored]


def test_runs_that_share_a_recommender_share_the_choice(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    monkeypatch.setattr(auto, "_measured_choice", lambda config, data: measured.append(config) or MIXED)
    rules = [compose([*tiny_overrides, *AUTO, f"aggregation={rule}"]) for rule in ("local", "fedavg")]
    explicit = compose(tiny_overrides)
    found = choose([*rules, explicit], build_data(explicit))
    assert [(c.trainer.precision, c.trainer.attention) for c in found] == [("bf16-mixed", "eager")] * 2 + [
        ("32-true", "sdpa")
    ]
    assert len(measured) == 1
    only_attention = compose([*tiny_overrides, "trainer.attention=auto"])
    assert chosen(only_attention, MIXED).trainer.precision == "32-true"


@pytest.mark.usefixtures("fast_bf16")
def test_what_is_measured_is_the_training_step_of_each_candidate(
    tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recommender that is built with the candidate's settings has the same loss, bit for bit."""
    seen: list[Measured] = []
    monkeypatch.setattr(auto, "select", lambda measured: seen.extend(measured) or measured[0])
    given = [*tiny_overrides, *SHORT, "adapter=lora"]
    config = compose([*given, *AUTO, "split.transport=inprocess", "split.hidden_dtype=bfloat16"])
    data = build_data(config)
    choose([config], data)
    assert [str(m.candidate) for m in seen] == [
        f"{precision} with {attention}"
        for precision in ("32-true", "bf16-mixed", "bf16-true")
        for attention in ("sdpa", "eager")
    ]
    for found in seen:
        own = [f"trainer.precision={found.candidate.precision}", f"trainer.attention={found.candidate.attention}"]
        recommender = build_recommender(compose([*given, *own]), data)
        assert measure(recommender, recommender.fabric, config.seed)[1] == found.loss, found
    assert len({m.loss for m in seen}) >= 3


def test_fabric_computes_in_the_precision_that_was_chosen_for_the_run() -> None:
    config = compose(["trainer.precision=auto"])
    fabric, ones = build_fabric(config), torch.ones(2, 2)
    types = {}
    for name in ("auto", "bf16-mixed", "32-true"):
        use_precision(fabric, compose([f"trainer.precision={name}"]))
        with fabric.autocast():
            types[name] = (ones @ ones).dtype
    assert types == {"auto": torch.float32, "bf16-mixed": torch.bfloat16, "32-true": torch.float32}
