"""Costs: the check values of METHOD §4, and sums by hand."""

from __future__ import annotations

import pytest
import torch

from fellrec.functional.cost import (
    PartCost,
    RoundLoad,
    Traffic,
    TrafficSettings,
    checkpoint_bytes,
    crossing_bytes,
    fraction,
    human_bytes,
    total_cost,
    traffic,
)

TRAINED = PartCost(num_layers=1, adapter_bytes=40, num_adapter_tensors=2)
FROZEN = PartCost(num_layers=1)


@pytest.mark.parametrize(("kept", "percent"), [(21, 67), (3, 13)])
def test_the_clients_fraction_of_the_weights_is_that_of_method(kept: int, percent: int) -> None:
    """METHOD §4, LLaMA-7B: per layer q, k, v, o of 4096², three MLP matrices of 4096 · 11008, two norms of 4096;
    embedding and LM head of 32000 · 4096 each, one norm."""
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    rest = 2 * 32000 * 4096 + 4096
    client = total_cost([PartCost(num_layers=kept, weight_bytes=4 * (kept * layer + rest))])
    server = PartCost(num_layers=32 - kept, weight_bytes=4 * (32 - kept) * layer)
    assert round(100 * fraction(client.weight_bytes, client.weight_bytes + server.weight_bytes)) == percent


def test_a_token_crosses_the_cuts_four_times() -> None:
    """METHOD §4: 4 crossings · hidden size · bytes. 1000 tokens of LLaMA-7B: 4 · 1000 · 4096 · 4 = 65.536 MB."""
    found = traffic(TRAINED, TRAINED, TRAINED, RoundLoad(1, 1000), TrafficSettings(4096))
    assert found.hidden_bytes + found.gradient_bytes == 65_536_000
    assert found.total_bytes == 65_536_000 + 2 * (40 + 40) + 8 + 16, "two adapters, up and down, and scalars"
    assert found.hidden_up_bytes == found.hidden_down_bytes == found.gradient_up_bytes == found.gradient_down_bytes


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 400), ("bfloat16", 200), ("float16", 200), ("int8", 120)])
def test_bytes_of_a_crossing_by_dtype(dtype: str, expected: int) -> None:
    """5 tokens of 20 numbers; int8 has a float32 scale per token: 5 · (20 + 4) = 120."""
    assert crossing_bytes(5, 20, dtype) == expected


def test_hidden_states_and_gradients_have_separate_dtypes() -> None:
    found = traffic(TRAINED, TRAINED, TRAINED, RoundLoad(1, 5), TrafficSettings(20, "int8", "bfloat16"))
    assert (found.hidden_up_bytes, found.gradient_down_bytes) == (120, 200)


@pytest.mark.parametrize(
    ("head", "body", "up", "down"),
    [(TRAINED, TRAINED, 8, 8), (TRAINED, FROZEN, 8, 8), (FROZEN, TRAINED, 8, 0), (FROZEN, FROZEN, 0, 0)],
)
def test_gradients_are_sent_only_to_and_through_trainable_parts(
    head: PartCost, body: PartCost, up: int, down: int
) -> None:
    found = traffic(head, body, TRAINED, RoundLoad(1, 1), TrafficSettings(2))
    assert (found.gradient_up_bytes, found.gradient_down_bytes) == (up, down)


def test_scalar_bytes() -> None:
    """3 steps. Up: clip factor and learning rate of 4 bytes per step, loss and samples of 8 bytes: 3 · 8 + 16.
    Down: 3 · 2 norms of 4 bytes."""
    clipped = traffic(TRAINED, TRAINED, TRAINED, RoundLoad(3, 9), TrafficSettings(2, clips_gradients=True))
    assert (clipped.scalar_up_bytes, clipped.scalar_down_bytes) == (40, 24)
    free = traffic(TRAINED, TRAINED, TRAINED, RoundLoad(3, 9), TrafficSettings(2))
    assert (free.scalar_up_bytes, free.scalar_down_bytes) == (40, 0)
    frozen = traffic(TRAINED, FROZEN, TRAINED, RoundLoad(3, 9), TrafficSettings(2, clips_gradients=True))
    assert (frozen.scalar_up_bytes, frozen.scalar_down_bytes) == (40, 0)


def test_without_a_body_only_adapters_are_transferred() -> None:
    found = traffic(TRAINED, PartCost(), TRAINED, RoundLoad(3, 9), TrafficSettings(2, clips_gradients=True))
    assert found == Traffic(adapter_up_bytes=80, adapter_down_bytes=80, scalar_up_bytes=16)


def test_a_rule_that_does_not_mix_transfers_no_adapters() -> None:
    found = traffic(TRAINED, TRAINED, TRAINED, RoundLoad(3, 9), TrafficSettings(2, exchanges_adapters=False))
    assert found.adapter_bytes == 0
    assert found.hidden_bytes > 0


def test_the_bodys_adapter_stays_on_the_server() -> None:
    found = traffic(FROZEN, TRAINED, FROZEN, RoundLoad(3, 9), TrafficSettings(2))
    assert found.adapter_bytes == 0


def test_optimiser_bytes_are_those_of_adamw() -> None:
    parameters = [torch.nn.Parameter(torch.ones(3, 5)), torch.nn.Parameter(torch.ones(7))]
    optimizer = torch.optim.AdamW(parameters)
    sum(parameter.sum() for parameter in parameters).backward()  # type: ignore[union-attr]
    optimizer.step()
    state = sum(tensor.nbytes for values in optimizer.state.values() for tensor in values.values())
    cost = PartCost(adapter_bytes=4 * 22, num_adapter_tensors=2)
    assert cost.optimizer_bytes == state
    assert cost.gradient_bytes == sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)


def test_a_full_adapter_is_part_of_the_weights_and_lora_is_not() -> None:
    """Weights 80, of which 8 bytes are trained: gradient 8, moments 16, one step count 4. LoRA adds its 8 bytes."""
    full = PartCost(weight_bytes=80, adapter_bytes=8, added_bytes=0, num_adapter_tensors=1, activation_bytes=5)
    lora = PartCost(weight_bytes=80, adapter_bytes=8, added_bytes=8, num_adapter_tensors=1, activation_bytes=5)
    assert (full.peak_bytes(), lora.peak_bytes()) == (80 + 8 + 20 + 5, 80 + 8 + 8 + 20 + 5)


def test_each_client_in_training_needs_all_but_the_weights() -> None:
    """Per client: adapter 8, gradient 8, moments 16, step count 4, activations 5."""
    part = PartCost(weight_bytes=80, adapter_bytes=8, added_bytes=8, num_adapter_tensors=1, activation_bytes=5)
    assert part.peak_bytes(3) - part.peak_bytes(2) == part.peak_bytes(2) - part.peak_bytes() == 8 + 8 + 20 + 5


def test_a_pooled_checkpoint_has_one_adapter_and_one_best_per_client() -> None:
    """One current, one best, three best-per-client adapters and one optimiser state: 5 · 40 + 2 · 40 + 4."""
    assert checkpoint_bytes(PartCost(adapter_bytes=40, num_adapter_tensors=1), 3, num_rows=1) == 284


@pytest.mark.parametrize(
    ("number", "shown"), [(9.994e3, "9.99 kB"), (9.996e3, "10.0 kB"), (99.96e6, "100 MB"), (999.6e6, "1.00 GB")]
)
def test_bytes_have_three_significant_digits(number: float, shown: str) -> None:
    assert human_bytes(number) == shown
