"""Clipping and noise of tensors that are sent through the cut."""

from __future__ import annotations

import pytest
import torch

from fellrec.cut.noise import Disturbance

STATES = torch.randn(4, 50, 32, generator=torch.Generator().manual_seed(0))


def test_nothing_is_done_unless_it_is_asked_for() -> None:
    assert Disturbance()(STATES, 0) is STATES


def test_tokens_within_the_norm_keep_their_bits_and_the_others_their_direction() -> None:
    norms = STATES.norm(dim=-1)
    limit = float(norms.median())
    clipped = Disturbance(clip=limit)(STATES, 0)
    assert torch.equal(clipped[norms <= limit], STATES[norms <= limit])
    torch.testing.assert_close(clipped.norm(dim=-1), norms.clamp(max=limit))
    torch.testing.assert_close(clipped / clipped.norm(dim=-1, keepdim=True), STATES / norms.unsqueeze(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_has_its_standard_deviation_and_another_value_at_every_place(dtype: torch.dtype) -> None:
    change, states = Disturbance(std=0.5, seed=3), STATES.to(dtype)
    noise = change(states, 1, 2, "train").float() - states.float()
    assert float(noise.std()) == pytest.approx(0.5, rel=4 / (2 * noise.numel()) ** 0.5)
    assert abs(float(noise.mean())) < 4 * 0.5 / noise.numel() ** 0.5
    assert torch.equal(change(states, 1, 2, "train"), change(states, 1, 2, "train"))
    for other in (change(states, 1, 3, "train"), Disturbance(std=0.5, seed=4)(states, 1, 2, "train")):
        correlation = torch.corrcoef(torch.stack([(other.float() - states.float()).flatten(), noise.flatten()]))[0, 1]
        assert abs(float(correlation)) < 4 / noise.numel() ** 0.5


def test_clipping_comes_before_the_noise() -> None:
    """Clipped to nearly nothing, what is left is the noise."""
    found = Disturbance(clip=1e-6, std=2.0)(STATES, 0)
    torch.testing.assert_close(found, Disturbance(std=2.0)(torch.zeros_like(STATES), 0), rtol=0, atol=1e-5)
