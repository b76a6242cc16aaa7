"""Dropout with packed masks: PyTorch's semantics, and masks that are the same for any number of threads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft.tuners.lora import LoraLayer
from small_models import CONFIGS
from transformers import AutoModelForCausalLM

from fellrec.models.adapters import LoraAdapter
from fellrec.models.architectures import arch_of
from fellrec.models.dropout import PackedDropout

NUM = 1 << 18


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_elements_are_dropped_independently_and_the_mean_stays(p: float) -> None:
    """Within five standard deviations of a binomial count, over all elements, and of pairs in and across a draw."""
    torch.manual_seed(0)
    found = PackedDropout(p)(torch.ones(NUM))
    kept = found != 0
    torch.testing.assert_close(found.unique(), torch.tensor([0.0, 1 / (1 - p)]), rtol=1e-3, atol=0)

    def is_near(count: int, trials: int, rate: float) -> bool:
        return abs(count - trials * rate) < 5 * (trials * rate * (1 - rate)) ** 0.5

    assert is_near(int(kept.sum()), NUM, 1 - p)
    for place in range(4):
        assert is_near(int(kept[place::4].sum()), NUM // 4, 1 - p), place
        both = kept.view(-1, 4)[:, place] & kept.view(-1, 4)[:, (place + 1) % 4]
        assert is_near(int(both.sum()), NUM // 4, (1 - p) ** 2), place
    assert is_near(int((kept[:-4] & kept[4:]).view(-1, 4)[:, 0].sum()), NUM // 4 - 1, (1 - p) ** 2)


def test_the_mask_is_16_bits_of_the_generators_words_and_scaled_by_their_probability() -> None:
    """NumPy reads the same 64-bit words; 0.05 · 2¹⁶ is rounded to 3277. The number of elements is not divisible by 4."""
    values = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    words = torch.empty(27, dtype=torch.int64).random_(-(2**63), None, generator=torch.Generator().manual_seed(5))
    levels = words.numpy().view(np.int16).astype(np.int64)[:105].reshape(3, 5, 7) + 32768
    expected = torch.from_numpy((levels >= 3277) * (65536 / (65536 - 3277)))
    torch.manual_seed(5)
    found = PackedDropout(0.05)(values)
    assert torch.equal(found, values * expected)
    found.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, expected)


def test_the_mask_does_not_depend_on_the_number_of_threads() -> None:
    before, masks = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            torch.manual_seed(1)
            masks.append(PackedDropout(0.3)(torch.ones(NUM)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*masks)


def test_in_evaluation_nothing_is_dropped_or_drawn() -> None:
    before = torch.get_rng_state()
    assert torch.equal(PackedDropout(0.5).eval()(torch.ones(9)), torch.ones(9))
    assert torch.equal(torch.get_rng_state(), before)


def test_every_module_of_a_lora_adapter_has_its_own() -> None:
    """As in PEFT; without dropout there is PEFT's identity."""
    for rate, kind in ((0.1, PackedDropout), (0.0, torch.nn.Identity)):
        model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
        LoraAdapter(dropout=rate).attach(model, arch_of(model.config), 0, lambda name: "body")
        found = [module.lora_dropout["default"] for module in model.modules() if isinstance(module, LoraLayer)]
        assert len(found) == len(set(found)) == 2 * model.config.num_hidden_layers
        assert {type(dropout) for dropout in found} == {kind}
