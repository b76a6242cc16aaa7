"""LoRA of several clients in one forward pass: the frozen weights once for all rows, A and B of each row's client.

Shape letters: K clients, B rows of a client, L tokens, I inputs and O outputs of a layer, R rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from fellrec.errors import ConfigError
from fellrec.models.peft_folder import ADAPTER_NAME
from fellrec.models.split import SplitModel
from fellrec.models.streams import StreamPosition, drawing


@dataclass(frozen=True)
class JointClient:
    """One of the clients whose rows go through the model together.

    Attributes:
        parameters: Its adapter, by name.
        position: Its random numbers.
    """

    parameters: Mapping[str, Tensor]
    position: StreamPosition


class JointLora:
    """Computes with a LoRA adapter for each client in the place of the one that is in the model.

    All clients get as many rows and tokens as the largest batch has, so that a layer needs two batched matrix products
    for all of them. What is added to a batch has no effect on its rows.

    Args:
        model: The backbone with its LoRA adapter.

    Raises:
        ConfigError: If LoRA adapts more than the decoder layers.
    """

    def __init__(self, model: SplitModel) -> None:
        self.model = model
        self._layers: dict[str, Any] = {
            name: module
            for name, module in model.model.named_modules()
            if isinstance(module, LoraLayer) and ADAPTER_NAME in module.lora_A
        }
        inside = f"{model.arch.names_prefix}{model.arch.layers}."
        if others := [name for name in self._layers if not name.startswith(inside)]:
            raise ConfigError(
                f"trainer.clients_per_step above 1 needs LoRA in the decoder layers alone: adapter.target_modules has "
                f"{', '.join(others[:3])}"
            )

    def encode(self, clients: Sequence[JointClient], inputs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """As ``SplitModel.encode`` for each client: the final hidden states ``[B, L, D]`` of its forward passes.

        Args:
            clients: Whose rows they are.
            inputs: Token ids ``[B, L]`` of each client's forward passes; those of the same number run together.
        """
        hidden: list[list[Tensor]] = [[] for _ in clients]
        for number in range(max(map(len, inputs))):
            places = [place for place, own in enumerate(inputs) if number < len(own)]
            ids = [inputs[place][number] for place in places]
            joint = _JointPass([clients[place] for place in places], [(len(own), own.shape[1]) for own in ids])
            with self._adapting(joint), self.model.streams.using_jointly([c.position for c in joint.clients]):
                final = self.model(joint.joined(ids, padding=0 if self.model.arch.is_causal else -1))
            for place, own_hidden in zip(places, joint.divided(final), strict=True):
                hidden[place].append(own_hidden)
        return hidden

    @contextmanager
    def _adapting(self, joint: _JointPass) -> Iterator[None]:
        """While this lasts, the layers add the adapters of the clients, and not that of the model."""
        handles = []
        for name, layer in self._layers.items():
            layer._disable_adapters = True  # as in SplitModel.without_lora
            name_a, name_b = (f"{name}.lora_{factor}.{ADAPTER_NAME}.weight" for factor in "AB")
            handles.append(layer.register_forward_hook(partial(_with_adapters, joint, name_a, name_b)))
        try:
            yield
        finally:
            for layer, handle in zip(self._layers.values(), handles, strict=True):
                layer._disable_adapters = False
                handle.remove()


class _JointPass:
    """A forward pass over rows of several clients, ``[K · B, L]``.

    Args:
        clients: In the order of their rows.
        sizes: Rows and tokens of each client's own batch.
    """

    def __init__(self, clients: Sequence[JointClient], sizes: Sequence[tuple[int, int]]) -> None:
        self.clients = clients
        self.sizes = sizes
        self.shape = max(rows for rows, _ in sizes), max(tokens for _, tokens in sizes)

    def joined(self, ids: Sequence[Tensor], padding: int) -> Tensor:
        """Token ids ``[K · B, L]`` of all clients, from those of each; a row that is added has tokens of its own."""
        (most_rows, most_tokens), joined = self.shape, []
        for own, (rows, tokens) in zip(ids, self.sizes, strict=True):
            padded = F.pad(own, (0, most_tokens - tokens), value=padding)
            joined.append(F.pad(padded, (0, 0, 0, most_rows - rows)))
        return torch.cat(joined)

    def divided(self, hidden: Tensor) -> list[Tensor]:
        """Each client's own part ``[B, L, D]`` of the hidden states of all."""
        parts = hidden.unflatten(0, (len(self.clients), -1)).unbind()
        return [
            part if size == self.shape else part[: size[0], : size[1]]
            for part, size in zip(parts, self.sizes, strict=True)
        ]

    @torch.no_grad()
    def dropout(self, module: nn.Dropout, like: Tensor) -> Tensor:
        """What dropout multiplies inputs ``[K, B, L, I]`` of a layer with: for each client what it draws alone.

        The module draws for a tensor of the shape and type that the client has alone: the numbers can depend on both.
        """
        factors = torch.zeros_like(like)
        for own, client, (rows, tokens) in zip(factors, self.clients, self.sizes, strict=True):
            with drawing(client.position, like.device):
                dropped = module(like.new_ones(rows, tokens, like.shape[-1]))
            own[:rows, :tokens] = dropped
        return factors


def _with_adapters(joint: _JointPass, name_a: str, name_b: str, layer: Any, inputs: Any, output: Tensor) -> Tensor:
    """The output ``[K · B, L, O]`` of a layer whose own adapter is switched off, plus those of the clients."""
    num_clients, dropout = len(joint.clients), layer.lora_dropout[ADAPTER_NAME]
    a_KRI, b_KOR = (torch.stack([c.parameters[name] for c in joint.clients]) for name in (name_a, name_b))
    hidden = inputs[0].to(a_KRI.dtype)
    if hidden.shape[:-1] != (num_clients * joint.shape[0], joint.shape[1]):
        raise ConfigError(
            f"trainer.clients_per_step above 1 needs layers that get the rows of a batch as they are; the input of "
            f"{name_a.partition('.lora_A')[0]} has the shape {list(hidden.shape)}"
        )
    if isinstance(dropout, nn.Dropout) and dropout.training:
        hidden_KBLI = hidden.unflatten(0, (num_clients, -1))
        hidden = hidden_KBLI * joint.dropout(dropout, hidden_KBLI)
    hidden = hidden.reshape(num_clients, -1, hidden.shape[-1])
    added = hidden.bmm(a_KRI.mT).bmm(b_KOR.mT).view_as(output)
    return torch.add(output, added, alpha=layer.scaling[ADAPTER_NAME]).to(output.dtype)


@torch.no_grad()
def draws_numbers(model: SplitModel, device: torch.device) -> bool:
    """Whether the backbone itself draws random numbers in training, such as for dropout in its attention."""
    was_training = model.training
    ids = torch.zeros(1, 2, dtype=torch.long, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), model.without_lora():
        before = _states(device)
        model.train()
        model(ids)
        model.train(was_training)
        return any(not torch.equal(left, right) for left, right in zip(before, _states(device), strict=True))


def _states(device: torch.device) -> list[Tensor]:
    """Of the generators that a computation on the device can draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
