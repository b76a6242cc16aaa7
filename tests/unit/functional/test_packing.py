"""Packing of hidden states: what is lost is bounded by the code's own resolution."""

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


def test_float32_loses_nothing(hidden: torch.Tensor) -> None:
    assert torch.equal(unpack(pack(hidden, "float32"), torch.float32, CPU), hidden)
    half = hidden.clamp(-1e4, 1e4).bfloat16()
    packed = pack(half, "float32")
    assert packed.nbytes == 2 * half.numel(), "what is narrow already stays so"
    assert torch.equal(unpack(packed, torch.bfloat16, CPU), half)


def test_bfloat16_keeps_eight_bits_of_mantissa(hidden: torch.Tensor) -> None:
    found = unpack(pack(hidden, "bfloat16"), torch.float32, CPU)
    assert bool(((found - hidden).abs() <= hidden.abs() * 2.0**-8).all())


def test_int8_errs_by_half_a_step_of_each_tokens_own_scale(hidden: torch.Tensor) -> None:
    found = unpack(pack(hidden, "int8"), torch.float32, CPU)
    step = hidden.abs().amax(dim=-1, keepdim=True) / 127
    assert bool(((found - hidden).abs() <= 0.5001 * step).all())
    largest = hidden.abs().argmax(dim=-1, keepdim=True)
    torch.testing.assert_close(found.gather(-1, largest), hidden.gather(-1, largest), rtol=1e-6, atol=0)


@pytest.mark.parametrize("packing", PACKINGS)
def test_zeros_and_batches_of_one_come_back(packing: str) -> None:
    nothing = torch.zeros(1, 1, 4)
    assert torch.equal(unpack(pack(nothing, packing), torch.float32, CPU), nothing)


@pytest.mark.parametrize(("packing", "per_token"), [("float32", 4 * 64), ("bfloat16", 2 * 64), ("int8", 64 + 4)])
def test_bytes_that_travel(hidden: torch.Tensor, packing: str, per_token: int) -> None:
    assert pack(hidden, packing).nbytes == 7 * 5 * per_token


def test_packing_takes_the_tensor_out_of_its_graph(hidden: torch.Tensor) -> None:
    assert not pack(hidden.requires_grad_(), "float32").codes.requires_grad
