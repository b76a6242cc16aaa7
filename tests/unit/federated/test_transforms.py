"""Clipping, noise, quantisation and the largest entries: laws, sizes, error feedback, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeExecutor, adapters, fake_loop, resumed
from torch import Tensor

from fellrec.aggregation import Uniform
from fellrec.config.compose import compose
from fellrec.errors import ConfigError, TrainingError
from fellrec.federated.transforms import Clip, Noise, Quantise, TopK

SHAPES = {"a": (3, 5), "b": (7,)}


def update(seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def norm(payload: Mapping[str, Tensor]) -> float:
    return float(torch.cat([tensor.flatten() for tensor in payload.values()]).double().norm())


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clipping_keeps_the_direction_and_bounds_the_norm(scale: float) -> None:
    given = update(scale=scale)
    clipped = Clip(norm=0.5).encode(given, 0, 0)
    assert norm(clipped) == pytest.approx(min(0.5, norm(given)), rel=1e-6)
    for name in SHAPES:
        torch.testing.assert_close(clipped[name] / norm(clipped), given[name] / norm(given), rtol=1e-5, atol=1e-6)


def test_zeros_are_not_divided() -> None:
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for transform in (Clip(), Quantise(), Quantise(bits=4), TopK()):
        decoded = transform.decode(transform.encode(zeros, 0, 0))
        assert all(torch.equal(decoded[name], zeros[name]) for name in SHAPES), transform


def test_the_adapted_norm_finds_the_quantile() -> None:
    """Of norms 1, 2, …, 10 the 0.7 quantile is between 7 and 8: C stays there, from far above and from far below."""
    direction = update()
    direction = {name: tensor / norm(direction) for name, tensor in direction.items()}
    for first in (100.0, 0.01):
        clip = Clip(norm=first, quantile=0.7, adaptation_rate=0.2)
        for round_index in range(150):
            for row in range(10):
                clip.encode({name: (row + 1) * tensor for name, tensor in direction.items()}, row, round_index)
        assert 6.9 < clip.bound < 8.1


def test_one_step_of_the_adapted_norm_is_that_of_the_paper() -> None:
    """One of two updates is within the norm, the target is 0.8: C exp(-0.2 (0.5 - 0.8))."""
    clip = Clip(norm=1.0, quantile=0.8)
    clip.encode({"a": torch.tensor([0.5])}, 0, 0)
    clip.encode({"a": torch.tensor([2.0])}, 1, 0)
    assert clip.bound == 1.0
    clip.encode({"a": torch.tensor([0.5])}, 0, 1)
    assert clip.bound == pytest.approx(math.exp(0.2 * 0.3))


def test_noise_has_its_standard_deviation_and_is_a_function_of_round_and_client() -> None:
    zeros = {"a": torch.zeros(200, 100)}
    first = Noise(std=0.3).encode(zeros, 1, 2)["a"]
    assert float(first.std()) == pytest.approx(0.3, rel=0.02)  # its standard error is 0.3 / √40000 = 0.0015
    assert float(first.mean()) == pytest.approx(0, abs=0.01)
    assert torch.equal(first, Noise(std=0.3).encode(zeros, 1, 2)["a"])
    for other in ((0, 2), (1, 3)):
        assert not torch.equal(first, Noise(std=0.3).encode(zeros, *other)["a"])
    assert not torch.equal(first, Noise(std=0.3, seed=1).encode(zeros, 1, 2)["a"])


@pytest.mark.parametrize("bits", [8, 4])
def test_quantisation_rounds_to_the_nearest_level(bits: int) -> None:
    given = update()
    decoded = Quantise(bits=bits).decode(Quantise(bits=bits).encode(given, 0, 0))
    for name, tensor in given.items():
        step = float(tensor.abs().max()) / (2 ** (bits - 1) - 1)
        assert float((decoded[name] - tensor).abs().max()) <= step / 2 * (1 + 1e-5)
        assert float(decoded[name].abs().max()) == pytest.approx(float(tensor.abs().max()))


@pytest.mark.parametrize(("bits", "expected"), [(8, 15 + 7 + 2 * 4), (4, 8 + 4 + 2 * 4 + (2 + 1) * 4)])
def test_the_payload_has_the_size_that_is_promised(bits: int, expected: int) -> None:
    """15 and 7 entries of a byte or half of one, a float32 distance each, and with 4 bits an int32 shape."""
    payload = Quantise(bits=bits).encode(update(), 0, 0)
    assert sum(tensor.nbytes for tensor in payload.values()) == expected


def test_the_largest_entries_are_sent() -> None:
    given = update()
    payload = TopK(fraction=0.2).encode(given, 0, 0)
    decoded = TopK().decode(payload)
    for name, tensor in given.items():
        count = max(1, round(0.2 * tensor.numel()))
        kept = decoded[name] != 0
        assert int(kept.sum()) == count
        assert torch.equal(decoded[name][kept], tensor[kept])
        assert float(tensor[kept].abs().min()) >= float(tensor[~kept].abs().max())
    assert payload["a|values"].nbytes + payload["a|places"].nbytes == 3 * (4 + 4)


@pytest.mark.parametrize("transform", [Quantise(bits=4), TopK(fraction=0.1)])
def test_what_is_not_sent_is_sent_later(transform: Any) -> None:
    """Error feedback: all that arrives in T rounds is all that was given, but for one rest, for each client."""
    arrived = {row: {name: torch.zeros(shape) for name, shape in SHAPES.items()} for row in (0, 3)}
    given = {row: {name: torch.zeros(shape) for name, shape in SHAPES.items()} for row in (0, 3)}
    for round_index in range(30):
        for row in (0, 3):
            new = update(seed=row)
            decoded = transform.decode(transform.encode(new, row, round_index))
            for name in SHAPES:
                arrived[row][name] += decoded[name]
                given[row][name] += new[name]
    for row in (0, 3):
        for name in SHAPES:
            left = transform.state_dict()[f"{row}|{name}"]
            torch.testing.assert_close(arrived[row][name] + left, given[row][name], rtol=0, atol=1e-4)
            assert float(left.norm()) < 0.5 * float(given[row][name].norm())


def test_without_feedback_small_entries_never_arrive() -> None:
    transform, given = TopK(fraction=0.1, error_feedback=False), update()
    first = transform.decode(transform.encode(given, 0, 0))
    second = transform.decode(transform.encode(given, 0, 1))
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)
    assert not transform.state_dict()


def test_quantisation_after_the_largest_entries() -> None:
    """Their places are sent as they are; an error cannot be fed back to entries that change."""
    chain = [TopK(fraction=0.4), Quantise(error_feedback=False)]
    payload: Mapping[str, Tensor] = update()
    for transform in chain:
        payload = transform.encode(payload, 0, 0)
    assert payload["a|places"].dtype == torch.int32
    assert payload["a|values|levels"].dtype == torch.int8
    for transform in reversed(chain):
        payload = transform.decode(payload)
    expected = TopK().decode(TopK(fraction=0.4).encode(update(), 0, 0))
    for name in SHAPES:
        torch.testing.assert_close(payload[name], expected[name], rtol=0, atol=0.02)
    with pytest.raises(TrainingError, match=r"cannot feed its error back for a\|values, .* error_feedback: false"):
        Quantise().encode(TopK().encode(update(), 0, 0), 0, 0)


@pytest.mark.parametrize(
    "chain",
    [[Clip, Quantise], [lambda: Clip(quantile=0.5), Noise, TopK], [lambda: Quantise(bits=4)]],
    ids=["clip-quantise", "clip-noise-topk", "quantise4"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(chain: list[Any], tmp_path: Path) -> None:
    how: dict[str, Any] = {"num_clients": 5, "participation": {"rate": 0.6}, "rule": Uniform()}
    whole = fake_loop(num_rounds=4, transforms=[make() for make in chain], **how)
    whole.run()
    first = fake_loop(num_rounds=2, transforms=[make() for make in chain], **how)
    first.run()
    second = resumed(first, tmp_path, num_rounds=4, transforms=[make() for make in chain], **how)
    second.run()
    assert adapters(second) == adapters(whole)
    assert second.exchange.ledger.rows() == whole.exchange.ledger.rows()


def test_without_a_loss_of_precision_the_chain_changes_nothing() -> None:
    plain, chained = fake_loop(num_rounds=2), fake_loop(num_rounds=2, transforms=[Clip(norm=1e6), Noise(std=0.0)])
    plain.run()
    chained.run()
    assert adapters(chained) == adapters(plain)
    assert isinstance(plain.executor, FakeExecutor)


def test_names_stand_for_classes_and_all_their_settings() -> None:
    config = compose(["exchange.transforms=[clip,{name: quantise, bits: 4}]"])
    assert list(config.exchange.transforms) == [
        {"_target_": "fellrec.federated.transforms.Clip", "norm": 1.0, "quantile": None, "adaptation_rate": 0.2},
        {"_target_": "fellrec.federated.transforms.Quantise", "bits": 4, "error_feedback": True},
    ]
    assert compose(["+exchange.transforms=[topk]"]).exchange.transforms[0].fraction == 0.1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[clipp]", "unknown transform 'clipp'; choose from: clip,"),
        ("[{name: quantise, bits: 5}]", "exchange.transforms.bits=5 is not allowed: 8 or 4"),
        (
            "[{name: clip, nrom: 1}]",
            "unknown setting 'exchange.transforms.nrom'; choose from: exchange.transforms.norm",
        ),
        ("[quantise,topk]", "topk after quantise is not allowed; the order is clip, noise, topk, quantise"),
        ("[topk,clip]", "clip after topk is not allowed"),
        ("[quantise,noise]", "noise after quantise is not allowed"),
        ("[topk,quantise]", "quantise after topk has no error feedback"),
        ("${oc.env:NOT_THERE}", "NOT_THERE"),
        ("${oc.env:NOT_THERE", "exchange.transforms"),
        ("[{name: topk, fraction: 0}]", r"exchange.transforms.fraction=0 is not allowed: a number in \(0, 1\]"),
    ],
)
def test_wrong_transforms_are_refused(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([f"exchange.transforms={value}"])
