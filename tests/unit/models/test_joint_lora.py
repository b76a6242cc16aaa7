"""Several clients' LoRA in one forward pass, against one client's adapter in the model after the other."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import CONFIGS, ENCODERS, LAYERS
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2Config

from fellrec.errors import ConfigError
from fellrec.functional.rng import derive_seed
from fellrec.models.adapters import LoraAdapter
from fellrec.models.joint_lora import JointClient, JointLora, draws_numbers
from fellrec.models.parameter_swap import ParameterSwap
from fellrec.models.split import SplitModel
from fellrec.models.streams import LayerStreams, StreamPosition, drawing

CPU = torch.device("cpu")
SIZES = [[(3, 7), (2, 4)], [(1, 9)], [(3, 5), (4, 3)]]
"""Rows and tokens of the forward passes of three clients."""


def split_model(config: Any, is_causal: bool = True, **adapter: Any) -> tuple[SplitModel, dict[str, nn.Parameter]]:
    """In float64: with random weights these small models can be ill-conditioned."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config) if is_causal else AutoModel.from_config(config)
    model, lora = SplitModel(made.double(), 1, 1), LoraAdapter(**{"dropout": 0.2, **adapter})
    lora.attach(model.model, model.arch, 0, model.part_of)
    return model.train(), lora.trainable(model.model)


def clients_of(trainable: dict[str, nn.Parameter]) -> list[dict[str, nn.Parameter]]:
    """A's and B's of three clients, with the names of the model's."""
    torch.manual_seed(1)
    return [{name: nn.Parameter(0.3 * torch.randn_like(p)) for name, p in trainable.items()} for _ in SIZES]


def inputs_of(is_causal: bool) -> list[list[Tensor]]:
    """Token ids; for an encoder the first row of each pass is one token shorter."""
    torch.manual_seed(2)
    found = [[torch.randint(3, 97, size) for size in own] for own in SIZES]
    for ids in (ids for own in found for ids in own if not is_causal):
        ids[0, -1] = -1
    return found


def loss_of(hidden: list[Tensor], inputs: list[Tensor]) -> Tensor:
    """A weighted sum of the hidden states of tokens; the norm of each is constant, a loss of it has no gradient."""
    weights = [torch.randn(h.shape, generator=torch.Generator().manual_seed(3)) for h in hidden]
    parts = [(w * h)[ids >= 0].sum() for w, h, ids in zip(weights, hidden, inputs, strict=True)]
    return torch.stack(parts).sum()


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma3_text", "mistral", "bert", "roberta", "distilbert", "modernbert"]
)
def test_hidden_states_and_gradients_are_those_of_each_client_alone(name: str) -> None:
    """GPT-2 has Conv1D layers and learned positions; encoders mask padding; batches differ in rows and tokens."""
    is_causal = name in CONFIGS
    config = copy.deepcopy(CONFIGS[name] if is_causal else ENCODERS[name])
    for key in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        setattr(config, key, 0.0)
    model, trainable = split_model(config, is_causal)
    everyone, inputs, swap = clients_of(trainable), inputs_of(is_causal), ParameterSwap(model.model, trainable)
    expected = []
    for client, (parameters, own) in enumerate(zip(everyone, inputs, strict=True)):
        with swap.using(parameters), model.streams.using(StreamPosition(client)):
            hidden = model.encode(own)
        loss_of(hidden, own).backward()
        expected.append((hidden, {name: p.grad for name, p in parameters.items()}))
    again = [{name: nn.Parameter(p.detach().clone()) for name, p in own.items()} for own in everyone]
    joint = [JointClient(own, StreamPosition(client)) for client, own in enumerate(again)]
    found = JointLora(model).encode(joint, inputs)
    sum(map(loss_of, found, inputs), torch.tensor(0.0)).backward()
    for (hidden, gradients), own_hidden, own, ids in zip(expected, found, again, inputs, strict=True):
        for left, right, tokens in zip(hidden, own_hidden, ids, strict=True):
            torch.testing.assert_close(left[tokens >= 0], right[tokens >= 0], rtol=1e-9, atol=1e-9)
        for key, gradient in gradients.items():
            difference = torch.linalg.vector_norm(own[key].grad - gradient)
            assert difference <= 1e-9 * torch.linalg.vector_norm(gradient), key


def test_dropout_draws_the_very_numbers_that_each_client_draws_alone() -> None:
    """What is kept by LoRA's dropout, in all layers and passes; clients are told apart by the shapes of their batches."""
    model, trainable = split_model(CONFIGS["llama"])
    everyone, swap, inputs = clients_of(trainable), ParameterSwap(model.model, trainable), inputs_of(is_causal=True)
    kept: dict[tuple[int, ...], list[Tensor]] = {}

    def keep(module: nn.Module, given: Any, output: Tensor) -> None:
        kept.setdefault(tuple(output.shape), []).append(output != 0)

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(keep)
    for client, (parameters, own) in enumerate(zip(everyone, inputs, strict=True)):
        with swap.using(parameters), model.streams.using(StreamPosition(client)):
            model.encode(own)
    alone, kept = kept, {}
    JointLora(model).encode([JointClient(own, StreamPosition(c)) for c, own in enumerate(everyone)], inputs)
    assert alone.keys() == kept.keys() == {(*size, 32) for own in SIZES for size in own}
    for shape, masks in alone.items():
        assert len(masks) == len(kept[shape]) == 2 * LAYERS
        assert all(torch.equal(one, other) for one, other in zip(masks, kept[shape], strict=True))


def test_a_client_continues_in_a_layer_where_its_last_draw_ended() -> None:
    """Two clients in turn, against PyTorch seeded by hand for each of them."""
    layer = nn.Identity()
    streams, positions = LayerStreams({3: layer}), [StreamPosition(seed) for seed in (7, 8)]
    found: list[list[Tensor]] = [[], []]
    with torch.random.fork_rng(), streams.using_jointly(positions):
        layer(torch.ones(1))
        for _ in range(2):
            for position, own in zip(positions, found, strict=True):
                with drawing(position, CPU):
                    own.append(torch.rand(5))
    for seed, own in zip((7, 8), found, strict=True):
        expected = torch.rand(10, generator=torch.Generator().manual_seed(derive_seed(seed, 3, 0)))
        assert torch.equal(torch.cat(own), expected)


def test_numbers_that_are_not_finite_stay_with_their_client() -> None:
    """Client 1 has an A that is not a number, and fewer rows and tokens than the others."""
    model, trainable = split_model(CONFIGS["llama"])
    everyone, inputs = clients_of(trainable), inputs_of(is_causal=True)
    with torch.no_grad():
        for parameter in everyone[1].values():
            parameter.fill_(float("nan"))
    found = JointLora(model).encode([JointClient(own, StreamPosition(c)) for c, own in enumerate(everyone)], inputs)
    sum((h.sum() for hidden in found for h in hidden), torch.tensor(0.0)).backward()
    for client, (own, hidden) in enumerate(zip(everyone, found, strict=True)):
        is_finite = {bool(tensor.isfinite().all()) for tensor in [*hidden, *(p.grad for p in own.values())]}
        assert is_finite == {client != 1}


def test_the_adapter_in_the_model_is_on_again_afterwards() -> None:
    model, trainable = split_model(CONFIGS["llama"], dropout=0.0)
    ids, (own, *_) = torch.ones(1, 4, dtype=torch.long), clients_of(trainable)
    before = model(ids)
    JointLora(model).encode([JointClient(own, StreamPosition(0))], [[ids]])
    assert torch.equal(model(ids), before)
    assert not any(layer._forward_hooks for layer in model.lora_layers())


def test_lora_outside_of_the_layers_is_refused() -> None:
    model, _ = split_model(CONFIGS["llama"], target_modules=["q_proj", "lm_head"])
    with pytest.raises(ConfigError, match="needs LoRA in the decoder layers alone: .* has lm_head"):
        JointLora(model)


def test_layers_that_change_the_rows_are_refused() -> None:
    """Longformer pads rows to whole windows."""
    model, trainable = split_model(ENCODERS["longformer"], is_causal=False)
    clients = [JointClient(own, StreamPosition(c)) for c, own in enumerate(clients_of(trainable))]
    with pytest.raises(
        ConfigError, match="needs layers that get the rows of a batch as they are; the input of .*query"
    ):
        JointLora(model).encode(clients, inputs_of(is_causal=False))


@pytest.mark.parametrize(("rate", "draws"), [(0.0, False), (0.1, True)])
@pytest.mark.parametrize("where", ["attn_pdrop", "resid_pdrop"])
def test_dropout_of_the_backbone_itself_is_found(where: str, rate: float, draws: bool) -> None:
    rates = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, where: rate}
    model, _ = split_model(GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, **rates))
    before = torch.get_rng_state()
    assert draws_numbers(model, CPU) is draws
    assert torch.equal(torch.get_rng_state(), before)
