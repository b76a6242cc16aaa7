"""Everything that can be sent between a client and the body server. No message has token ids, labels, titles or users.

Every message is a frozen record that checks itself when it is made, on either side: hidden states and gradients are
floating tensors of three dimensions, masks are boolean, all named tensors (adapters, optimiser states, tensors of local
terms) are floating. Integers are counts and positions in batches. ``METHOD §4`` describes what is sent when.

The body's adapters and their optimiser states belong to the server's side of the federation. The server process keeps
none of them: it receives a client's with ``OpenSlot`` or ``Serve`` and returns them with ``SlotClosed``. These
transfers are not traffic between client and server, and have no sizes in the ledger.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fellrec.distributed.message import Done, Message, require
from fellrec.federated.slot_state import SlotState
from fellrec.functional.packing import Packed

PHASES = ("train", "val", "test")
POSITIONS = ("absolute", "masked")
"""Position ids count all places, or only those that the mask keeps; nothing else can be asked for."""


@dataclass(frozen=True)
class ClientMessage(Message):
    """Base of messages about one client.

    Attributes:
        client: Row of the population.
        round_index: From 0; -1 is before the first round.
        phase: ``"train"``, ``"val"`` or ``"test"``.
    """

    client: int
    round_index: int
    phase: str
    to_server: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self, self.phase in PHASES, f"phase {self.phase!r} must be one of {', '.join(PHASES)}")
        require(self, self.client >= 0, f"client {self.client} is negative")
        require(self, self.round_index >= -1, f"round {self.round_index} is before the first")
        for name in ("number", "base", "cache", "source", "target", "total_steps", "head_layers"):
            value = getattr(self, name, None)
            require(self, value is None or value >= 0, f"{name} {value} is negative")

    def sizes(self) -> dict[str, int]:
        """Payload bytes by kind: ``hidden_state``, ``gradient``, ``scalar``."""
        return {}


@dataclass(frozen=True)
class OpenSlot(ClientMessage):
    """To the server: a client begins its local training of a round.

    Attributes:
        adapter: See ``SlotState``; the same for those that follow.
        optimizer: As above.
        anchors: As above.
        tensors: As above.
        trains: As above.
        base: Changes of the frozen base that must be applied.
        total_steps: See ``SlotState``.
        head_layers: Layers of the client's head: where the body begins.
    """

    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    anchors: Mapping[str, Tensor] = field(default_factory=dict)
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    trains: tuple[str, ...] | None = None
    base: int = 0
    total_steps: int = 0
    head_layers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_floating(self, self.adapter, self.optimizer, self.anchors, self.tensors)

    @property
    def state(self) -> SlotState:
        """What the slot begins with."""
        return SlotState(self.adapter, self.optimizer, self.anchors, self.tensors, self.trains, self.total_steps)


@dataclass(frozen=True)
class CloseSlot(ClientMessage):
    """To the server: the client's local training is over.

    Attributes:
        keep: Whether ``SlotClosed`` is wanted; false if the client failed: nothing answers then.
    """

    keep: bool = True


@dataclass(frozen=True)
class SlotClosed(ClientMessage):
    """From the server: the body's part of what a client's training ends with; see ``SlotState``."""

    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    to_server: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_floating(self, self.adapter, self.optimizer, self.tensors)

    @property
    def state(self) -> SlotState:
        """The same as a record."""
        return SlotState(self.adapter, self.optimizer, {}, self.tensors)


@dataclass(frozen=True)
class Serve(ClientMessage):
    """To the server: a client is going to be evaluated with this adapter of the body.

    Attributes:
        adapter: By parameter; empty if nothing of the body is trained.
        base: As in ``OpenSlot``.
        head_layers: As in ``OpenSlot``.
    """

    adapter: Mapping[str, Tensor]
    base: int = 0
    head_layers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_floating(self, self.adapter)


@dataclass(frozen=True)
class StopServing(ClientMessage):
    """To the server: the evaluation that ``Serve`` began is over; the adapter is freed."""


@dataclass(frozen=True)
class HiddenState(ClientMessage):
    """To the server: the head's output for one micro-batch.

    Attributes:
        number: Number of the forward pass of this client.
        hidden: ``[B, L, D]`` for each forward pass of the micro-batch (one, or two for a model with two towers).
        mask: ``[B, seen + L]`` bool, or ``None`` for no padding that matters.
        positions: See ``POSITIONS``.
        training: Whether dropout is on.
        keeps_graph: Whether a ``Gradient`` follows.
        needs_gradient: Whether the client needs ∂L/∂h of the head's output.
        without_lora: Whether LoRA is switched off: the frozen backbone computes.
        cache: Number of the key-value cache that continues here; ``None`` without.
    """

    number: int
    hidden: tuple[Packed, ...]
    mask: Tensor | None = None
    positions: str = "absolute"
    training: bool = False
    keeps_graph: bool = False
    needs_gradient: bool = False
    without_lora: bool = False
    cache: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_packed(self, *self.hidden)
        if self.mask is not None:
            require(self, self.mask.dtype == torch.bool and self.mask.dim() == 2, "its mask must be [B, L] of bool")
        require(self, self.positions in POSITIONS, f"positions {self.positions!r} must be one of {POSITIONS}")

    def sizes(self) -> dict[str, int]:
        """The mask counts as part of the hidden state."""
        return {"hidden_state": _num_bytes(self.hidden) + (0 if self.mask is None else self.mask.nbytes)}


@dataclass(frozen=True)
class HiddenReply(ClientMessage):
    """From the server: the body's output ``[B, L, D]`` for a ``HiddenState``."""

    number: int
    hidden: tuple[Packed, ...]
    to_server: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_packed(self, *self.hidden)

    def sizes(self) -> dict[str, int]:
        """All of it is hidden state."""
        return {"hidden_state": _num_bytes(self.hidden)}


@dataclass(frozen=True)
class Gradient(ClientMessage):
    """To the server: ∂L/∂h of the body's output.

    Attributes:
        number: Of the forward pass.
        gradient: ``[B, L, D]`` for each forward pass of the micro-batch.
        wants_norms: Whether this is the last gradient of an optimiser step that is going to be clipped.
        learning_rate: Of that step, for local terms, which change the gradient before it is clipped; ``None`` without.
    """

    number: int
    gradient: tuple[Packed, ...]
    wants_norms: bool = False
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_packed(self, *self.gradient)

    def sizes(self) -> dict[str, int]:
        """The learning rate is a float32."""
        return {"gradient": _num_bytes(self.gradient)} | ({} if self.learning_rate is None else {"scalar": 4})


@dataclass(frozen=True)
class GradientReply(ClientMessage):
    """From the server: ∂L/∂h of the head's output, and what clipping needs.

    Attributes:
        number: Of the forward pass.
        gradient: ``[B, L, D]`` for each forward pass; empty if nothing in the head is trained.
        names: Parameters of the body that have a gradient, if norms were asked for.
        norms: ``[P]`` float32, the norm of each of these.
    """

    number: int
    gradient: tuple[Packed, ...] = ()
    names: tuple[str, ...] = ()
    norms: Tensor | None = None
    to_server: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_packed(self, *self.gradient)
        if self.norms is not None:
            is_vector = self.norms.is_floating_point() and self.norms.dim() == 1
            require(self, is_vector, "its norms must be a floating vector")

    def sizes(self) -> dict[str, int]:
        """Norms are scalars; names are the same in every step."""
        sizes = {"gradient": _num_bytes(self.gradient)} if self.gradient else {}
        return sizes | ({} if self.norms is None else {"scalar": self.norms.nbytes})


@dataclass(frozen=True)
class Step(ClientMessage):
    """To the server: take the optimiser step of the body's adapter.

    Attributes:
        clip_factor: The gradient is multiplied by it first.
        learning_rate: Of this step.
    """

    clip_factor: float
    learning_rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = (self.clip_factor, self.learning_rate)
        require(self, all(map(math.isfinite, numbers)), f"its numbers {numbers} are not finite")

    def sizes(self) -> dict[str, int]:
        """Two float32."""
        return {"scalar": 8}


@dataclass(frozen=True)
class SelectRows(ClientMessage):
    """To the server: cache ``target`` becomes the rows of cache ``source`` (beam search).

    Attributes:
        source: Number of a cache.
        target: Number of a cache, old or new.
        rows: ``[b]`` int64 positions in the batch; ``None`` for all rows.
    """

    source: int
    target: int
    rows: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows is not None:
            is_vector = self.rows.dtype == torch.int64 and self.rows.dim() == 1
            require(self, is_vector, "its rows must be a vector of int64")

    def sizes(self) -> dict[str, int]:
        """Positions count as scalars."""
        return {} if self.rows is None else {"scalar": self.rows.nbytes}


@dataclass(frozen=True)
class DropCache(ClientMessage):
    """To the server: cache ``cache`` is not needed any more."""

    cache: int


@dataclass(frozen=True)
class ChangeBase(Message):
    """To the server: a change of the frozen base, see ``BaseWeights``; sent in order. Known ones are ignored.

    Attributes:
        version: Number of the change, from 0.
        factors: Two factors per weight of the body.
    """

    version: int
    factors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        require(self, self.version >= 0, f"version {self.version} is negative")
        _check_floating(self, self.factors)


@dataclass(frozen=True)
class Report(Message):
    """To the server: ``ServerReport`` answers."""


@dataclass(frozen=True)
class ServerReport(Done):
    """From the server: what it has used so far.

    Attributes:
        busy_seconds: Time that it computed for training.
        peak_bytes: Its largest memory.
    """

    busy_seconds: float = 0.0
    peak_bytes: int = 0


def _num_bytes(tensors: tuple[Packed, ...]) -> int:
    return sum(packed.nbytes for packed in tensors)


def _check_floating(message: Message, *mappings: Mapping[str, Tensor]) -> None:
    for name, tensor in (item for mapping in mappings for item in mapping.items()):
        require(message, tensor.is_floating_point(), f"{name} must be a floating tensor")


def _check_packed(message: Message, *tensors: Packed) -> None:
    for packed in tensors:
        codes, scale = packed.codes, packed.scale
        require(message, codes.dim() == 3, f"its tensor has shape {list(codes.shape)}, expected [B, L, D]")
        if scale is None:
            require(message, codes.is_floating_point(), f"its tensor is {codes.dtype}, expected a floating type")
            continue
        expected, found = [*codes.shape[:2], 1], list(scale.shape)
        require(message, codes.dtype == torch.int8, f"its codes are {codes.dtype}, expected int8")
        require(message, found == expected, f"its scale has shape {found}, expected {expected}")
        require(message, scale.dtype == torch.float32, f"its scale is {scale.dtype}, expected float32")
