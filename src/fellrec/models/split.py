"""Head, body and tail: three slices of one Hugging Face model that share its layers.

Each part is the model's own class with a slice of its layer list, entered through ``inputs_embeds``; no ``forward`` is
rewritten, so what a part computes is what the whole model computes there, to the last bit.

Shape letters: B rows, L tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fellrec.errors import BackboneError
from fellrec.models.architectures import ArchSpec, arch_of, decoder_layers


class _NoPositions(nn.Module):
    """Stands for a learned position embedding where it was added already: adds zero."""

    def forward(self, position_ids: Tensor) -> Tensor:
        """A zero that broadcasts to any hidden state."""
        return torch.zeros((), device=position_ids.device)


class SplitModel(nn.Module):
    """A causal LM cut in three: head and tail for the client, body for the server (METHOD §4).

    All parts run here, in one process, and share the parameters of ``model``.

    Args:
        model: A Hugging Face causal LM of a known architecture.
        head_layers: Decoder layers in the head, beside the embedding.
        tail_layers: Decoder layers in the tail, beside the final norm and the LM head.

    Attributes:
        model: The whole model; its parameter names are those of the unsplit one.

    Raises:
        BackboneError: If the cuts do not fit into the model's layers.
    """

    def __init__(self, model: nn.Module, head_layers: int, tail_layers: int) -> None:
        super().__init__()
        self.model: Any = model
        self.arch = arch_of(model.config)
        num_layers = len(decoder_layers(model, self.arch))
        if head_layers < 0 or tail_layers < 0 or head_layers + tail_layers > num_layers:
            raise BackboneError(
                f"split.head_layers={head_layers} and split.tail_layers={tail_layers} do not fit: both must be at "
                f"least 0 and together at most {num_layers}, the backbone's decoder layers"
            )
        self.head_layers, self.tail_layers, self.num_layers = head_layers, tail_layers, num_layers
        first_of_tail = num_layers - tail_layers
        # Tuples keep the parts out of nn.Module's registry: a shared parameter is listed once, under the model's name.
        self._parts = (
            _part(model, self.arch, range(head_layers), is_head=True, is_tail=False),
            _part(model, self.arch, range(head_layers, first_of_tail), is_head=False, is_tail=False),
            _part(model, self.arch, range(first_of_tail, num_layers), is_head=False, is_tail=True),
        )

    def train(self, mode: bool = True) -> SplitModel:
        """As in PyTorch; the parts follow."""
        super().train(mode)
        for part in self._parts:
            part.training = mode
        return self

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings ``[..., D]``, without positions."""
        return self.model.get_input_embeddings()(input_ids)

    def head(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Client: embedding and first layers.

        Args:
            input_ids: ``[B, L]`` int64.
            attention_mask: ``[B, L]``, 1 for tokens and 0 for padding; ``None`` if padding, if any, is on the right
                and its outputs are not used.

        Returns:
            Hidden state ``[B, L, D]``.
        """
        return self._run(0, self.embed(input_ids), attention_mask)

    def body(self, hidden_BLD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Server: the middle layers, ``[B, L, D]`` to ``[B, L, D]``."""
        return self._run(1, hidden_BLD, attention_mask)

    def tail(self, hidden_BLD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Client: the last layers and the final norm, ``[B, L, D]`` to ``[B, L, D]``."""
        return self._run(2, hidden_BLD, attention_mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Head, body and tail: the final hidden state ``[B, L, D]``."""
        hidden_BLD = self.head(input_ids, attention_mask)
        if self.head_layers + self.tail_layers < self.num_layers:
            hidden_BLD = self.body(hidden_BLD, attention_mask)
        return self.tail(hidden_BLD, attention_mask)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of final hidden states ``[..., D]``."""
        logits = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def part_of_parameter(self) -> dict[str, str]:
        """``head``, ``body`` or ``tail`` for every parameter name of the whole model."""
        return {name: self._part_of(name) for name, _ in self.model.named_parameters()}

    def _part_of(self, name: str) -> str:
        prefix = f"{self.arch.inner}.{self.arch.layers}."
        if name.startswith(prefix):
            layer = int(name.removeprefix(prefix).split(".")[0])
            if layer < self.head_layers:
                return "head"
            return "body" if layer < self.num_layers - self.tail_layers else "tail"
        entry = (self.arch.embedding, self.arch.position_embedding)
        return "head" if name.removeprefix(f"{self.arch.inner}.").split(".")[0] in entry else "tail"

    def _run(self, part: int, inputs_embeds: Tensor, attention_mask: Tensor | None) -> Tensor:
        inner = self._parts[part]
        return inner(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False).last_hidden_state


def _part(model: nn.Module, arch: ArchSpec, layers: range, is_head: bool, is_tail: bool) -> nn.Module:
    """The inner model's class with some of its layers; the modules are shared, not copied."""
    inner = getattr(model, arch.inner)
    part = copy.copy(inner)
    part._modules = dict(inner._modules)
    part._modules[arch.layers] = getattr(inner, arch.layers)[layers.start : layers.stop]
    part.config = copy.copy(inner.config)
    if getattr(inner.config, "layer_types", None):  # looked up by position in the list of layers
        part.config.layer_types = inner.config.layer_types[layers.start : layers.stop] or inner.config.layer_types[:1]
    if not is_tail:
        part._modules[arch.norm] = nn.Identity()
    if not is_head:
        for name in arch.entry:
            part._modules[name] = nn.Identity()
        if arch.position_embedding:
            part._modules[arch.position_embedding] = _NoPositions()
    return part
