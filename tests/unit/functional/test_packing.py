"""Packing of hidden states: the error is bounded by the resolution of the dtype."""

from __future__ import annotations

import pytest
import torch

from fellrec.functional.packing import PACKINGS, pack, unpack

CPU = torch.device("cpu")


@pytest.fixture
def hidden() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-6, 6, 7 * 5).reshape(7, 5, 1)
    return torch.randn(7, 5, 64, generator=generator) * scales


def test_float32_is_lossless(hidden: torch.Tensor) -> None:
    assert torch.equal(unpack(pack(hidden, "float32"), torch.float32, CPU), hidden)
    half = hidden.clamp(-1e4, 1e4).bfloat16()
    packed = pack(half, "float32")
    assert packed.nbytes == 2 * half.numel(), "a narrower dtype is kept"
    assert torch.equal(unpack(packed, torch.bfloat16, CPU), half)


def test_bfloat16_has_eight_bits_of_precision(hidden: torch.Tensor) -> None:
    found = unpack(pack(hidden, "bfloat16"), torch.float32, CPU)
    assert bool(((found - hidden).abs() <= hidden.abs() * 2.0**-8).all())


def test_the_error_of_int8_is_half_a_step_of_each_tokens_scale(hidden: torch.Tensor) -> None:
    found = unpack(pack(hidden, "int8"), torch.float32, CPU)
    step = hidden.abs().amax(dim=-1, keepdim=True) / 127
    assert bool(((found - hidden).abs() <= 0.5001 * step).all())
    largest = hidden.abs().argmax(dim=-1, keepdim=True)
    torch.testing.assert_close(found.gather(-1, largest), hidden.gather(-1, largest), rtol=1e-6, atol=0)


@pytest.mark.parametrize("packing", PACKINGS)
def test_zeros_and_batches_of_one_are_restored(packing: str) -> None:
    nothing = torch.zeros(1, 1, 4)
    assert torch.equal(unpack(pack(nothing, packing), torch.float32, CPU), nothing)


@pytest.mark.parametrize(("packing", "per_token"), [("float32", 4 * 64), ("bfloat16", 2 * 64), ("int8", 64 + 4)])
def test_bytes_to_transfer(hidden: torch.Tensor, packing: str, per_token: int) -> None:
    assert pack(hidden, packing).nbytes == 7 * 5 * per_token


def test_packing_detaches_the_tensor(hidden: torch.Tensor) -> None:
    assert not pack(hidden.requires_grad_(), "float32").codes.requires_grad
