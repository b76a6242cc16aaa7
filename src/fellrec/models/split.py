"""Head, body and tail: three slices of one Hugging Face model that share its layers.

Each part is the model's own class with a slice of its layer list, entered through ``inputs_embeds``; no ``forward`` is
rewritten, so what a part computes is what the whole model computes there, to the last bit.

Shape letters: B rows, L tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from fellrec.models.architectures import ArchSpec, arch_of, context_of, decoder_layers
from fellrec.models.encoders import AlreadyEmbedded, run_encoder, tokens_of
from fellrec.models.remote import (
    PARTS,
    BodyLink,
    Cut,
    CutCache,
    MissingHead,
    NoPositions,
    absolute_positions,
    client_share,
    masked_positions,
    refuse_whole_encoder,
    remember_length,
    remote_body,
    with_layers,
)
from fellrec.models.streams import LayerStreams
from fellrec.models.times import NO_TIMES, Times


class SplitModel(nn.Module):
    """A causal LM or an encoder cut in three: head and tail for the client, body for the server (METHOD §4).

    Without a link all parts run here and share the parameters of ``model``. With one, this is the client's share: the
    body's layers leave ``model``, and whatever it computes crosses the two cuts.

    Clients may have heads of different depths. The model of all of them has the layers of the deepest head, or on the
    server those of the largest body, and is cut at one depth at a time, see `at_depth`.

    Args:
        model: A Hugging Face causal LM or encoder of a known architecture, or the server's share of one.
        head_layers: Decoder layers in the head, beside the embedding; or several such depths.
        tail_layers: Decoder layers in the tail, beside the final norm and the LM head.
        link: To the server that runs the body; ``None`` if the body runs here.

    Attributes:
        model: The model; its parameter names are those of the unsplit one, and so are its ``forward`` and
            ``generate``.
        cuts: Where it can be cut, by the layers of the head.
        cut: Where it is cut now; with several depths the shallowest, outside of `at_depth`.
        streams: Random numbers of its layers.
        times: Told where a training step is.

    Raises:
        BackboneError: If the cuts do not fit into the model's layers.
    """

    def __init__(
        self, model: nn.Module, head_layers: int | Collection[int], tail_layers: int, link: BodyLink | None = None
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.arch = arch_of(model.config)
        layers = decoder_layers(model, self.arch)
        depths = [head_layers] if isinstance(head_layers, int) else sorted(head_layers)
        self.cuts = {depth: Cut(depth, tail_layers, len(layers)) for depth in depths}
        self.cut = self.cuts[depths[0]]
        self.times: Times = NO_TIMES
        self._link = link
        self._own_attention = self.attention
        self._shares: dict[int, list[nn.Module]] = {}
        if link is not None:
            self._shares = {depth: client_share(model, cut, link) for depth, cut in self.cuts.items()}
            refuse_whole_encoder(model)
            self._use_share(depths[-1])  # with all layers that a client has
        inner = self.arch.inner_of(model)
        entry = {-1 - number: inner._modules[name] for number, name in enumerate(self.arch.entry)}
        self.streams = LayerStreams({**entry, **dict(enumerate(layers))})
        # Tuples keep the parts out of nn.Module's registry: a shared parameter is listed once.
        self._parts_at = {
            depth: tuple(_part(model, self.arch, cut, part) for part in PARTS) for depth, cut in self.cuts.items()
        }
        self._parts = self._parts_at[depths[0]]

    @property
    def is_cut(self) -> bool:
        """Whether the body is behind a link."""
        return self._link is not None

    @property
    def context(self) -> int | None:
        """The longest text that the model reads, in tokens; ``None`` without end."""
        return context_of(self.model.config)

    @property
    def has_window(self) -> bool:
        """Whether a layer attends to the last tokens only."""
        config = self.model.config
        kinds = getattr(config, "layer_types", None)
        if kinds:
            return any(kind != "full_attention" for kind in kinds)
        return getattr(config, "sliding_window", None) is not None

    @property
    def num_embeddings(self) -> int:
        """Tokens that have an embedding."""
        return int(self.model.get_input_embeddings().num_embeddings)

    @property
    def missing_head(self) -> list[str]:
        """Parameters of the LM head if the files have none, as those of embedding models; empty if they have one."""
        head = self.model.get_output_embeddings()
        return head.names if isinstance(head, MissingHead) else []

    def train(self, mode: bool = True) -> SplitModel:
        """As in PyTorch; the parts follow."""
        super().train(mode)
        if len(self._shares) > 1:  # also layers that are not in the model at this depth
            for layer in [layer for share in self._shares.values() for layer in share]:
                layer.train(mode)
        for part in self._all_parts:
            part.training = mode
        return self

    @property
    def attention(self) -> str:
        """How attention is computed, as in transformers: ``sdpa`` or ``eager``."""
        return str(self.model.config._attn_implementation)

    def use_attention(self, name: str) -> None:
        """Compute attention by ``eager``, or, with another name, as transformers chose: ``sdpa`` where it can."""
        for model in (self.model, *self._all_parts):
            model.set_attn_implementation("eager" if name == "eager" else self._own_attention)

    @contextmanager
    def at_depth(self, head_layers: int) -> Iterator[None]:
        """While this lasts, the head has as many layers.

        Args:
            head_layers: One of ``cuts``.
        """
        before = self.cut, self._parts
        self.cut, self._parts = self.cuts[head_layers], self._parts_at[head_layers]
        self._use_share(head_layers)
        try:
            yield
        finally:
            self.cut, self._parts = before
            self._use_share(max(self.cuts))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings ``[..., D]``, without positions; those of padding, which is negative, have no meaning."""
        return self.model.get_input_embeddings()(input_ids if self.arch.is_causal else input_ids.clamp(min=0))

    def head(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Client: embedding and first layers.

        Args:
            input_ids: ``[B, L]`` int64; an encoder's padding is negative.
            attention_mask: ``[B, L]``, 1 for tokens and 0 for padding; ``None`` if padding, if any, is on the right
                and its outputs are not used, and for encoders, which see padding by the ids.

        Returns:
            Hidden state ``[B, L, D]``.
        """
        if attention_mask is None and not self.arch.is_causal:
            attention_mask = input_ids >= 0
        self.times.enter_part("head", input_ids)
        return self._run(0, self.embed(input_ids), attention_mask)

    def body(self, hidden_BLD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Server: the middle layers, ``[B, L, D]`` to ``[B, L, D]``."""
        if self._link is not None:
            return self._link.run_body(hidden_BLD, attention_mask, "absolute", None)
        return self._run(1, hidden_BLD, attention_mask)

    def tail(self, hidden_BLD: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Client: the last layers and the final norm, ``[B, L, D]`` to ``[B, L, D]``."""
        return self._run(2, hidden_BLD, attention_mask)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Head, body and tail: the final hidden state ``[B, L, D]``."""
        hidden_BLD = self.head(input_ids, attention_mask)
        if self.cut.layers("body"):
            hidden_BLD = self.body(hidden_BLD, attention_mask)
        return self.tail(hidden_BLD, attention_mask)

    def encode(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The final hidden states ``[B, L, D]`` of all forward passes of one micro-batch, for its loss.

        Args:
            inputs: Token ids ``[B, L]``, one tensor for each forward pass. With a link, all cross the cut together.
        """
        if self._link is None or not self.training:
            return [self(ids) for ids in inputs]
        heads = [self.head(ids) for ids in inputs]
        self.times.enter_part("body")
        bodies = [self.times.leave_part(body_BLD, "body") for body_BLD in remote_body(self._link, heads)]
        return [self.tail(hidden_BLD) for hidden_BLD in bodies]

    def serve_body(self, hidden_BLD: Tensor, mask: Tensor | None, positions: str, cache: Cache | None) -> Tensor:
        """Server: the middle layers for the next L tokens, ``[B, L, D]`` to ``[B, L, D]``; a cache grows by them.

        Args:
            hidden_BLD: The head's output for the new tokens.
            mask: ``[B, seen + L]``, 1 for tokens and 0 for padding; ``None`` without padding that matters.
            positions: ``"absolute"``, or ``"masked"`` to count the mask's tokens only.
            cache: From ``new_cache``, or ``None``.
        """
        if not self.arch.is_causal:
            return self._run(1, hidden_BLD, mask)
        length, layer = hidden_BLD.shape[1], self.cut.layers("body").start
        seen = 0 if cache is None else cache.get_seq_length(layer)
        if positions == "masked":
            assert mask is not None
            position_ids = masked_positions(mask, length)
        else:
            position_ids = absolute_positions(hidden_BLD[:1], seen, length)
        output = self._parts[1](
            inputs_embeds=hidden_BLD,
            attention_mask=mask,
            position_ids=position_ids,
            **self.cache_argument(cache),
            use_cache=cache is not None,
        )
        if cache is not None:
            for number in (*self.cut.layers("head"), *self.cut.layers("tail")):
                remember_length(cache, number, hidden_BLD)
        return output.last_hidden_state

    def cache_argument(self, cache: Cache | None) -> dict[str, Cache | None]:
        """A key-value cache as an argument of the model: ``cache`` since Transformers 5.24, before that
        ``past_key_values``.
        """
        names = inspect.signature(self.model.forward).parameters
        return {"cache" if "cache" in names else "past_key_values": cache}

    def new_cache(self) -> Cache:
        """An empty key-value cache for ``model``; with a link it has a side on the server too."""
        if self._link is None:
            return DynamicCache(config=self.model.config)
        return CutCache(self.model.config, self._link, self._link.new_cache())

    def copy_cache(self, cache: Cache) -> Cache:
        """A copy of a cache that grows on its own."""
        if isinstance(cache, CutCache):
            return cache.duplicate(cache.link.new_cache())
        return copy.deepcopy(cache)

    def drop_cache(self, cache: Cache) -> None:
        """Free the server's side of a cache that is not needed any more."""
        if isinstance(cache, CutCache):
            cache.link.drop_cache(cache.number)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of final hidden states ``[..., D]``."""
        logits = self.model.get_output_embeddings()(hidden)
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def lora_layers(self) -> list[BaseTunerLayer]:
        """The layers of this share that have a LoRA adapter."""
        return [module for module in self.modules() if isinstance(module, BaseTunerLayer)]

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        """While this lasts, LoRA adapters are switched off, on both sides of the cuts: the frozen backbone computes."""
        layers = self.lora_layers()
        for layer in layers:
            layer._disable_adapters = True  # enable_adapters() would also freeze and unfreeze parameters
        try:
            with self._link.without_lora() if self._link is not None else nullcontext():
                yield
        finally:
            for layer in layers:
                layer._disable_adapters = False

    def part_of(self, name: str) -> str:
        """``head``, ``body`` or ``tail`` for a dotted name of the whole model; of several depths, at the smallest."""
        return self.cuts[min(self.cuts)].part_of(name, self.arch)

    def part_of_parameter(self) -> dict[str, str]:
        """``head``, ``body`` or ``tail`` for every parameter name of the model."""
        return {name: self.part_of(name) for name, _ in self.model.named_parameters()}

    @property
    def _all_parts(self) -> list[Any]:
        return [part for parts in self._parts_at.values() for part in parts]

    def _use_share(self, head_layers: int) -> None:
        """Put the layers that a client with such a head has, and its link to the others, into the model."""
        layers = decoder_layers(self.model, self.arch)
        for number, layer in enumerate(self._shares.get(head_layers, ())):
            layers[number] = layer

    def _run(self, part: int, inputs_embeds: Tensor, attention_mask: Tensor | None) -> Tensor:
        self.times.enter_part(PARTS[part])
        return self.times.leave_part(self._computed(part, inputs_embeds, attention_mask), PARTS[part])

    def _computed(self, part: int, inputs_embeds: Tensor, attention_mask: Tensor | None) -> Tensor:
        inner = self._parts[part]
        if not self.arch.is_causal:
            mask = tokens_of(inputs_embeds) if attention_mask is None else attention_mask
            return run_encoder(inner, self.arch, inputs_embeds, mask)
        return inner(inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False).last_hidden_state


def _part(model: nn.Module, arch: ArchSpec, cut: Cut, name: str) -> nn.Module:
    """The inner model's class with some of its layers; the modules are shared, not copied."""
    inner: Any = arch.inner_of(model)
    layers = cut.layers(name)
    part: Any = with_layers(inner, arch, decoder_layers(model, arch)[layers.start : layers.stop])
    part._forward_pre_hooks = type(inner._forward_pre_hooks)()  # those of the whole model
    part._forward_pre_hooks_with_kwargs = type(inner._forward_pre_hooks_with_kwargs)()
    part.config = copy.copy(inner.config)
    if getattr(inner.config, "layer_types", None):  # looked up by position in the list of layers
        part.config.layer_types = inner.config.layer_types[layers.start : layers.stop] or inner.config.layer_types[:1]
    if name != "tail" and arch.norm is not None:
        part._modules[arch.norm] = nn.Identity()
    if name != "head":
        for entry in arch.entry:
            part._modules[entry] = AlreadyEmbedded()
        if arch.position_embedding:
            part._modules[arch.position_embedding] = NoPositions()
    return part


def bytes_of_parts(model: SplitModel, parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes of the parameters in each part; a tied parameter counts once, as the embedding, on the client."""
    found = dict.fromkeys(PARTS, 0)
    for name, parameter in parameters.items():
        found[model.part_of(name)] += parameter.numel() * parameter.element_size()
    return found
