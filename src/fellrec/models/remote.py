"""Where a model is cut, and what stands for the layers that run elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from fellrec.errors import BackboneError
from fellrec.models.architectures import ArchSpec, arch_of, decoder_layers

PARTS = ("head", "body", "tail")


@dataclass(frozen=True)
class Cut:
    """Two cuts through a stack of layers.

    Attributes:
        head_layers: Layers on the client after the embedding.
        tail_layers: Layers on the client before the final norm and the LM head.
        num_layers: All layers.

    Raises:
        BackboneError: If the cuts do not fit into the layers.
    """

    head_layers: int
    tail_layers: int
    num_layers: int

    def __post_init__(self) -> None:
        head, tail = self.head_layers, self.tail_layers
        if head < 0 or tail < 0 or head + tail > self.num_layers:
            raise BackboneError(
                f"split.head_layers={head} and split.tail_layers={tail} do not fit: both must be at "
                f"least 0 and together at most {self.num_layers}, the backbone's layers"
            )

    def layers(self, part: str) -> range:
        """The layers of ``head``, ``body`` or ``tail``."""
        bounds = (0, self.head_layers, self.num_layers - self.tail_layers, self.num_layers)
        index = PARTS.index(part)
        return range(bounds[index], bounds[index + 1])

    def require_body(self) -> None:
        """Refuse cuts that leave nothing between them, where the body runs elsewhere.

        Raises:
            BackboneError: If they do.
        """
        if not self.layers("body"):
            raise BackboneError(
                f"split.head_layers={self.head_layers} and split.tail_layers={self.tail_layers} leave the server "
                f"nothing of the backbone's {self.num_layers} layers; lower one of them or give split=default"
            )

    def part_of(self, name: str, arch: ArchSpec) -> str:
        """The part that a parameter or module of the whole model belongs to, by its dotted name."""
        prefix = f"{arch.names_prefix}{arch.layers}."
        if name.startswith(prefix):
            layer = int(name.removeprefix(prefix).split(".")[0])
            return next(part for part in PARTS if layer in self.layers(part))
        first = name.removeprefix(arch.names_prefix).split(".")[0]
        return "head" if first in (arch.embedding, arch.position_embedding, *arch.entry) else "tail"


class BodyLink(Protocol):
    """What a client's model needs of the server: the body's output for a hidden state, and gradients of it.

    Attributes:
        trains_body: Whether the server trains something.
    """

    trains_body: bool

    def run_body(self, hidden: Tensor, mask: Tensor | None, positions: str, cache: int | None) -> Tensor:
        """The body's output ``[B, L, D]`` for the head's ``[B, L, D]``; see ``positions_of`` for ``positions``."""

    def forward(self, hidden: tuple[Tensor, ...], keeps_graph: bool, needs_gradient: bool) -> tuple[Any, Any]:
        """The body's outputs in training for the head's outputs of one micro-batch, and a handle for `backward`.

        Args:
            hidden: ``[B, L, D]`` for each forward pass.
            keeps_graph: Whether `backward` follows.
            needs_gradient: Whether gradients of ``hidden`` are wanted.
        """

    def backward(self, handle: Any, gradients: tuple[Tensor, ...], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Gradients of the hidden states for those of the body's outputs; empty if they are not wanted.

        Args:
            handle: From `forward`.
            gradients: ``[B, L, D]`` for each forward pass.
            like: Tensors with the types and on the devices of the hidden states.
        """

    def new_cache(self) -> int:
        """A number for a cache on the server, which no other process uses."""

    def select_rows(self, source: int, target: int, rows: Tensor | None) -> None:
        """Let the server's cache ``target`` be the rows of its cache ``source``, all of them for ``None``."""

    def drop_cache(self, cache: int) -> None:
        """Let the server forget a cache."""

    def without_lora(self) -> AbstractContextManager[None]:
        """While this lasts, the server's LoRA adapters are switched off."""


class CutCache(DynamicCache):
    """The client's side of a key-value cache: what is done to it is done to the server's side too.

    Args:
        config: Of the whole model.
        link: To the server.
        number: Names the server's side of the cache.
    """

    def __init__(self, config: Any, link: BodyLink, number: int) -> None:
        super().__init__(config=config)
        self.link = link
        self.number = number

    def reorder_cache(self, beam_idx: Any) -> None:
        """As in transformers, on both sides."""
        super().reorder_cache(beam_idx)
        self.link.select_rows(self.number, self.number, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """As in transformers, on both sides."""
        keys: Any = self.layers[0]
        rows = torch.arange(len(keys.keys)).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self.link.select_rows(self.number, self.number, rows)

    def duplicate(self, number: int) -> CutCache:
        """A copy that grows on its own, under another number."""
        twin = copy.copy(self)
        twin.layers = copy.deepcopy(self.layers)
        twin.number = number
        self.link.select_rows(self.number, number, None)
        return twin


def _cache_in(values: Iterable[Any]) -> Cache | None:
    """The key-value cache among arguments; what it is called depends on the release of Transformers."""
    return next((value for value in values if isinstance(value, Cache)), None)


class RemoteLayer(nn.Module):
    """Stands for a decoder layer of another process; the hidden state passes unchanged.

    The cache gets an entry of the right length, so that whatever asks it how much it has seen gets the right answer.
    """

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, L, D]`` unchanged."""
        cache = _cache_in((*args, *kwargs.values()))
        if cache is not None:
            remember_length(cache, self.layer, hidden)
        return hidden


class RemoteBody(RemoteLayer):
    """Stands for the first layer of the body, and sends the hidden state through all of it.

    Args:
        layer: Its number.
        link: To the server.
    """

    def __init__(self, layer: int, link: BodyLink) -> None:
        super().__init__(layer)
        self.link = link
        self._call: dict[str, Any] = {}

    def listen(self, inner: nn.Module) -> None:
        """Learn of every call of the whole model what its layers are not told: the mask as it was given."""
        inner.register_forward_pre_hook(self._remember, with_kwargs=True)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The body's output ``[B, L, D]``."""
        mask, position_ids, cache = (self._call[name] for name in ("attention_mask", "position_ids", "cache"))
        seen = 0 if cache is None else cache.get_seq_length(self.layer)
        positions = positions_of(position_ids, mask, seen, hidden.shape[1])
        number = cache.number if isinstance(cache, CutCache) else None
        output = self.link.run_body(hidden, mask, positions, number)
        super().forward(hidden, *args, **kwargs)
        return output

    def _remember(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._call = {name: kwargs.get(name) for name in ("attention_mask", "position_ids")}
        self._call["cache"] = _cache_in(kwargs.values())


class _RemoteFunction(torch.autograd.Function):
    """The body's layers on a server as one operation of the client's graph."""

    @staticmethod
    def forward(ctx: Any, link: BodyLink, trained: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
        """The body's outputs; ``trained`` lets a frozen head's output have a gradient function."""
        needs_gradient = any(ctx.needs_input_grad[2:])
        outputs, ctx.handle = link.forward(heads, True, needs_gradient)
        ctx.link, ctx.like = link, tuple(head.new_empty(0) for head in heads)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        """Ask the server for the gradients of the heads' outputs; its own stay there."""
        arrived = ctx.link.backward(ctx.handle, gradients, ctx.like)
        return None, None, *(arrived or (None,) * len(gradients))


def remote_body(link: BodyLink, heads: Sequence[Tensor]) -> list[Tensor]:
    """The body's outputs ``[B, L, D]`` in training for the head's outputs of one micro-batch, differentiable."""
    if torch.is_grad_enabled() and (link.trains_body or any(head.requires_grad for head in heads)):
        trained = torch.zeros((), requires_grad=link.trains_body)
        return list(_RemoteFunction.apply(link, trained, *heads))
    outputs, _ = link.forward(tuple(heads), False, False)
    return list(outputs)


class NoPositions(nn.Module):
    """Stands for a learned position embedding where it was added already: adds zero."""

    def forward(self, *args: Any, position_ids: Tensor | None = None) -> Tensor:
        """A zero that broadcasts to any hidden state; OPT gives a mask before the position ids."""
        given = args[0] if position_ids is None else position_ids
        return torch.zeros((), device=given.device)


class MissingHead(nn.Module):
    """Stands for an LM head that is not in the files, as of embedding models: nothing but an error.

    Args:
        names: Its parameters.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.names = sorted(names)

    def forward(self, hidden: Tensor) -> Tensor:
        """Never used: an objective that needs the head refuses such a model.

        Raises:
            BackboneError: Always.
        """
        raise BackboneError("the backbone's files have no LM head, which this objective or ranker needs")


def without_missing_head(model: Any, missing: Iterable[str]) -> set[str]:
    """Replace a causal LM's head by `MissingHead` if the files do not have it.

    Args:
        model: The causal LM or encoder; changed in place.
        missing: Names of its parameters that are not in the files.

    Returns:
        The other missing names.
    """
    found, head = set(missing), model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), "")
    own = {f"{name}.{key}" for key, _ in head.named_parameters()} if name else set()
    if own & found:
        model._modules[name] = MissingHead(own)
    return found - own


def positions_of(position_ids: Tensor | None, mask: Tensor | None, seen: int, length: int) -> str:
    """Name the rule behind position ids, so that they need not be sent.

    Args:
        position_ids: ``[B, L]`` or ``[1, L]`` int64; ``None`` stands for ``"absolute"``.
        mask: ``[B, seen + L]``, 1 for tokens and 0 for padding.
        seen: Tokens in the cache.
        length: L.

    Returns:
        ``"absolute"`` if they count all places, ``"masked"`` if they count the places that the mask keeps.

    Raises:
        BackboneError: If they do neither.
    """
    if position_ids is None or torch.equal(position_ids, absolute_positions(position_ids, seen, length)):
        return "absolute"
    if mask is not None:
        kept = mask[:, -length:].bool()
        if torch.equal(position_ids[kept], masked_positions(mask, length)[kept]):
            return "masked"
    raise BackboneError("position ids that count neither all places nor the mask's tokens cannot cross a cut")


def absolute_positions(like: Tensor, seen: int, length: int) -> Tensor:
    """``[rows, L]`` counting on from ``seen``, as many rows as ``like``."""
    return torch.arange(seen, seen + length, device=like.device).expand(len(like), length)


def masked_positions(mask: Tensor, length: int) -> Tensor:
    """``[B, L]`` for the last L places of a mask: the number of tokens before each."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -length:]


def remember_length(cache: Cache, layer: int, hidden: Tensor) -> None:
    """Lengthen a cache's entry of a layer that runs elsewhere by the ``[B, L, D]`` hidden state's L."""
    nothing = hidden.new_zeros(len(hidden), 1, hidden.shape[1], 1)
    cache.update(nothing, nothing, layer)


def with_layers(inner: nn.Module, arch: ArchSpec, layers: nn.Module) -> nn.Module:
    """An inner model with other layers, whose modules are shared, not copied."""
    return _with_module(inner, arch.layers, layers)


def _with_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """A model with another module in one place, given by its dotted name; all others are shared, not copied."""
    twin = level = copy.copy(model)
    twin._modules = dict(model._modules)
    *holders, last = name.split(".")
    for holder in holders:
        found = copy.copy(level._modules[holder])
        assert found is not None
        found._modules = dict(found._modules)
        level._modules[holder] = level = found
    level._modules[last] = module
    return twin


def server_shell(model: Any, cut: Cut) -> Any:
    """The server's share of a model: the body's layers under their own names, nothing else.

    Args:
        model: The whole model, or one without weights; not changed, and its layers are shared.
        cut: Where it is cut.

    Raises:
        BackboneError: If nothing is left for the server.
    """
    cut.require_body()
    arch = arch_of(model.config)
    layers, body = decoder_layers(model, arch), cut.layers("body")
    kept = (layer if number in body else RemoteLayer(number) for number, layer in enumerate(layers))
    inner = with_layers(arch.inner_of(model), arch, nn.ModuleList(kept))
    for name in (arch.embedding, arch.norm, *arch.entry):
        if name is not None:
            inner._modules[name] = nn.Identity()
    if arch.position_embedding:
        inner._modules[arch.position_embedding] = NoPositions()
    if not arch.inner:
        return inner
    shell: Any = _with_module(model, arch.inner, inner)
    first = arch.inner.partition(".")[0]
    for name in shell._modules:
        if name != first:
            shell._modules[name] = nn.Identity()
    return shell


def client_share(model: Any, cut: Cut, link: BodyLink) -> list[nn.Module]:
    """The layers of a model with a link to the server in the place of the body's; the model is not changed.

    With these layers a causal LM is still one: its own ``forward`` and ``generate`` cross the two cuts. An encoder
    writes nothing, and crosses them part by part only.

    Raises:
        BackboneError: If nothing is left for the server.
    """
    cut.require_body()
    arch = arch_of(model.config)
    layers, body = list(decoder_layers(model, arch)), cut.layers("body")
    remote = RemoteBody(body.start, link)
    remote.listen(arch.inner_of(model))
    return [*layers[: body.start], remote, *map(RemoteLayer, body[1:]), *layers[body.stop :]]


def refuse_whole_encoder(model: Any) -> None:
    """Let an encoder whose body is elsewhere run part by part only."""
    if not arch_of(model.config).is_causal:
        model.register_forward_pre_hook(_refuse_to_run_whole)


def _refuse_to_run_whole(model: nn.Module, inputs: object) -> None:
    raise AssertionError("an encoder whose body is elsewhere runs part by part, see SplitModel")
