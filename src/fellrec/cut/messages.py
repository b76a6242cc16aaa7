"""All that can cross between client and server. There is no message for token ids, labels, titles or users.

Every message is a frozen record that checks itself when it is made, on either side: hidden states and gradients are
floating tensors of three dimensions, masks are boolean, adapters are floating. Integers are counts and positions in
batches. ``METHOD §4`` says what travels when.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from fellrec.errors import SplitError
from fellrec.functional.packing import Packed

PROTOCOL_VERSION = 1
"""Raise it when a message changes; processes of different versions refuse each other."""

PHASES = ("train", "val", "test")
POSITIONS = ("absolute", "masked")
"""Position ids count all places, or only those that the mask keeps; nothing else can be asked for."""


@dataclass(frozen=True)
class Message:
    """Base of all messages."""

    to_server: ClassVar[bool] = True

    def sizes(self) -> dict[str, int]:
        """Payload bytes by kind: ``hidden_state``, ``gradient``, ``adapter``, ``scalar``."""
        return {}


@dataclass(frozen=True)
class ClientMessage(Message):
    """Base of messages about one client.

    Attributes:
        client: Row of the client in the population's adapters.
        round_index: From 0; -1 is before the first round.
        phase: ``"train"``, ``"val"`` or ``"test"``.
    """

    client: int
    round_index: int
    phase: str

    def __post_init__(self) -> None:
        _require(self, self.phase in PHASES, f"phase {self.phase!r} is none of {', '.join(PHASES)}")
        _require(self, self.client >= 0, f"client {self.client} is negative")


@dataclass(frozen=True)
class HiddenState(ClientMessage):
    """Client to server: the head's output for one micro-batch.

    Attributes:
        ticket: Number of the forward pass within the client's round.
        hidden: ``[B, L, D]`` for each forward pass of the micro-batch (one, or two for a model with two towers).
        mask: ``[B, seen + L]`` bool, or ``None`` for no padding that matters.
        positions: See ``POSITIONS``.
        needs_gradient: Whether the client wants ∂L/∂h of it.
        bank: The adapter to use when not training, see ``RunState.bank_named``.
        without_lora: Whether LoRA is switched off: the frozen backbone computes.
        cache: Number of the key-value cache that continues here, ``None`` without.
    """

    ticket: int
    hidden: tuple[Packed, ...]
    mask: Tensor | None = None
    positions: str = "absolute"
    needs_gradient: bool = True
    bank: str = "current"
    without_lora: bool = False
    cache: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_packed(self, *self.hidden)
        if self.mask is not None:
            _require(self, self.mask.dtype == torch.bool and self.mask.dim() == 2, "its mask is no [B, L] of bool")
        _require(self, self.positions in POSITIONS, f"positions {self.positions!r} are none of {POSITIONS}")

    def sizes(self) -> dict[str, int]:
        """The mask counts as part of the hidden state."""
        return {"hidden_state": _num_bytes(self.hidden) + (0 if self.mask is None else self.mask.nbytes)}


@dataclass(frozen=True)
class HiddenReply(ClientMessage):
    """Server to client: the body's output ``[B, L, D]`` for a ``HiddenState``."""

    ticket: int
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
    """Client to server: ∂L/∂h of the body's output.

    Attributes:
        ticket: Of the forward pass.
        gradient: ``[B, L, D]`` for each forward pass of the micro-batch.
        wants_norms: Whether this is the last gradient of an optimiser step that is going to be clipped.
    """

    ticket: int
    gradient: tuple[Packed, ...]
    wants_norms: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_packed(self, *self.gradient)

    def sizes(self) -> dict[str, int]:
        """All of it is gradient."""
        return {"gradient": _num_bytes(self.gradient)}


@dataclass(frozen=True)
class GradientReply(ClientMessage):
    """Server to client: ∂L/∂h of the head's output, and what clipping needs.

    Attributes:
        ticket: Of the forward pass.
        gradient: ``[B, L, D]`` for each forward pass; empty if nothing in the head is trained.
        norms: ``[P]`` float32, norm of the gradient of each of the body's trainable tensors, by sorted name; -1 for
            one without a gradient.
    """

    ticket: int
    gradient: tuple[Packed, ...] = ()
    norms: Tensor | None = None
    to_server: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_packed(self, *self.gradient)
        if self.norms is not None:
            _require(self, self.norms.is_floating_point() and self.norms.dim() == 1, "its norms are no floating vector")

    def sizes(self) -> dict[str, int]:
        """Norms are scalars."""
        sizes = {"gradient": _num_bytes(self.gradient)} if self.gradient else {}
        return sizes | ({} if self.norms is None else {"scalar": self.norms.nbytes})


@dataclass(frozen=True)
class Step(ClientMessage):
    """Client to server: take the optimiser step of the body's adapter.

    Attributes:
        clip_factor: The gradient is multiplied by it first.
        learning_rate: Of this step.
    """

    clip_factor: float
    learning_rate: float

    def sizes(self) -> dict[str, int]:
        """Two float32."""
        return {"scalar": 8}


@dataclass(frozen=True)
class Finish(ClientMessage):
    """Client to server: the client's local training of this round is over.

    Attributes:
        loss: METHOD (2)'s L_c.
        num_samples: Training targets.
        keep: False if the client dropped out: the body's adapter goes back to what it was.
    """

    loss: float
    num_samples: int
    keep: bool = True

    def sizes(self) -> dict[str, int]:
        """Two numbers of eight bytes."""
        return {"scalar": 16}


@dataclass(frozen=True)
class Upload(ClientMessage):
    """Client to server: head and tail adapter, for aggregation and only if the rule mixes.

    Attributes:
        adapter: Parameter name → tensor.
    """

    adapter: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, tensor in self.adapter.items():
            _require(self, tensor.is_floating_point(), f"{name} is no floating tensor")

    def sizes(self) -> dict[str, int]:
        """All of it is adapter."""
        return {"adapter": sum(tensor.nbytes for tensor in self.adapter.values())}


@dataclass(frozen=True)
class Download(Upload):
    """Server to client: the mixed head and tail adapter."""

    to_server: ClassVar[bool] = False


@dataclass(frozen=True)
class Fetch(ClientMessage):
    """Client to server: ask for the client's mixed head and tail adapter; the answer is a ``Download``."""


@dataclass(frozen=True)
class SelectRows(ClientMessage):
    """Client to server: cache ``target`` becomes the rows of cache ``source`` (beam search).

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
            _require(self, self.rows.dtype == torch.int64 and self.rows.dim() == 1, "its rows are no vector of int64")

    def sizes(self) -> dict[str, int]:
        """Positions count as scalars."""
        return {} if self.rows is None else {"scalar": self.rows.nbytes}


@dataclass(frozen=True)
class DropCache(ClientMessage):
    """Client to server: cache ``cache`` is not needed any more."""

    cache: int


@dataclass(frozen=True)
class Aggregate(Message):
    """To the server: mix the adapters of the cohort; the answer is ``Mixed``.

    Attributes:
        round_index: From 0.
        clients: The cohort without those that dropped out, ascending.
    """

    round_index: int
    clients: tuple[int, ...]


@dataclass(frozen=True)
class Mixed(Message):
    """From the server: what the rule reports beside the adapters, for the books.

    Attributes:
        matrices: By name, ``[N, N]``.
        per_client: By name, ``[N]``.
    """

    matrices: Mapping[str, Tensor]
    per_client: Mapping[str, Tensor]
    to_server: ClassVar[bool] = False


@dataclass(frozen=True)
class KeepBest(Message):
    """To the server: the current adapters are the best so far.

    Attributes:
        population: Whether for the population's mean.
        clients: The clients for whom they are, and the row that serves each.
        rows: See ``clients``.
    """

    population: bool
    clients: tuple[int, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True)
class SaveState(Message):
    """To the server: write a checkpoint; the answer is ``Done``.

    Attributes:
        run_dir: The run's directory.
        round_index: Rounds that are done.
    """

    run_dir: str
    round_index: int


@dataclass(frozen=True)
class LoadState(SaveState):
    """To the server: read the checkpoint of this round; the answer is ``Done``."""


@dataclass(frozen=True)
class SaveAdapters(Message):
    """To the server: write its share of the selected adapters; the answer is ``Done``.

    Attributes:
        folder: Where.
        bank: ``"best"`` or ``"best_per_client"``.
    """

    folder: str
    bank: str


@dataclass(frozen=True)
class Report(Message):
    """To the server: tell how busy it was; the answer is ``Done``."""


@dataclass(frozen=True)
class Done(Message):
    """From the server: what was asked for is done.

    Attributes:
        busy_seconds: Time that it has computed since the run began.
        peak_bytes: Its largest memory so far.
    """

    busy_seconds: float = 0.0
    peak_bytes: int = 0
    to_server: ClassVar[bool] = False


@dataclass(frozen=True)
class Hello(Message):
    """From the first client process to all others at the start.

    Attributes:
        facts: Settings that all processes must agree on, and the backbone's fingerprint.
        folder: The backbone's folder.
        num_clients: Clients of the population.
        body_names: The server's trainable parameters, once they are known.
    """

    facts: Mapping[str, Any]
    folder: str
    num_clients: int
    body_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ready(Message):
    """The answer to ``Hello``.

    Attributes:
        body_names: The server's trainable parameters, sorted; empty from a client process.
    """

    body_names: tuple[str, ...] = ()
    to_server: ClassVar[bool] = False


@dataclass(frozen=True)
class Abort(Message):
    """Between processes: the sender gives up.

    Attributes:
        reason: One sentence for the user.
    """

    reason: str


@dataclass(frozen=True)
class Stop(Message):
    """To every process: the run is over."""


@dataclass(frozen=True)
class AmongClients(Message):
    """Base of messages between client processes, for the experiment's books. The server never gets one."""


@dataclass(frozen=True)
class Train(AmongClients):
    """To a client process: train these clients, and send their adapters up if the rule mixes; ``Trained`` answers."""

    round_index: int
    clients: tuple[int, ...]


@dataclass(frozen=True)
class Trained(AmongClients):
    """What became of them.

    Attributes:
        updates: Per client that finished: client, samples, steps, loss, seconds.
        failures: Client → why it did not finish; keys are text.
        ledger: Rows of the process's ledger since it was last asked.
    """

    updates: tuple[tuple[Any, ...], ...]
    failures: Mapping[str, str]
    ledger: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Refresh(AmongClients):
    """To a client process: fetch these clients' mixed adapters; ``Scored`` without users answers."""

    round_index: int
    clients: tuple[int, ...]


@dataclass(frozen=True)
class Score(AmongClients):
    """To a client process: rank for the users whom these rows of a bank serve; ``Scored`` answers."""

    stage: str
    round_index: int
    bank: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Scored(AmongClients):
    """Metrics of single users.

    Attributes:
        users: From ``FellrecModule.take_users``: one ``UserMetrics`` for each of the ranker's choices.
        ledger: Rows of the process's ledger since it was last asked.
    """

    users: tuple[tuple[Tensor, ...], ...]
    ledger: tuple[tuple[Any, ...], ...]


def _subclasses(cls: type[Message]) -> list[type[Message]]:
    return [found for sub in cls.__subclasses__() for found in (sub, *_subclasses(sub))]


def encode(message: Message) -> tuple[dict[str, Any], list[Tensor]]:
    """A message as plain values and tensors; ``decode`` reads it.

    Returns:
        JSON-ready values in which a tensor is ``{"tensor": position}``, and the tensors.
    """
    tensors: list[Tensor] = []
    values = {item.name: _encode(getattr(message, item.name), tensors) for item in fields(message)}
    return {"type": type(message).__name__, "fields": values}, tensors


def decode(plain: Mapping[str, Any], tensors: list[Tensor]) -> Message:
    """Read what ``encode`` made.

    Raises:
        SplitError: If there is no such message, or it refuses its contents.
    """
    known = {cls.__name__: cls for cls in _subclasses(Message)}
    if plain.get("type") not in known:
        raise SplitError(f"unknown message {plain.get('type')!r}")
    try:
        return known[plain["type"]](**{key: _decode(value, tensors) for key, value in plain["fields"].items()})
    except (TypeError, KeyError, IndexError) as error:
        raise SplitError(f"malformed message {plain['type']}: {error}") from error


def _encode(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value.detach().contiguous())
        return {"tensor": len(tensors) - 1}
    if isinstance(value, Packed):
        return {"packed": [_encode(value.codes, tensors), _encode(value.scale, tensors)]}
    if isinstance(value, Mapping):
        return {"map": {key: _encode(item, tensors) for key, item in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    return value


def _decode(value: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "packed" in value:
        codes, scale = (_decode(item, tensors) for item in value["packed"])
        return Packed(codes, scale)
    if "map" in value:
        return {key: _decode(item, tensors) for key, item in value["map"].items()}
    return tuple(_decode(item, tensors) for item in value["tuple"])


def _num_bytes(tensors: tuple[Packed, ...]) -> int:
    return sum(packed.nbytes for packed in tensors)


def _check_packed(message: Message, *tensors: Packed) -> None:
    for packed in tensors:
        codes, scale = packed.codes, packed.scale
        _require(message, codes.dim() == 3, f"its tensor has shape {list(codes.shape)}, expected [B, L, D]")
        if scale is None:
            _require(message, codes.is_floating_point(), f"its tensor is {codes.dtype}, expected a floating type")
            continue
        expected, found = [*codes.shape[:2], 1], list(scale.shape)
        _require(message, codes.dtype == torch.int8, f"its codes are {codes.dtype}, expected int8")
        _require(message, found == expected, f"its scale has shape {found}, expected {expected}")
        _require(message, scale.dtype == torch.float32, f"its scale is {scale.dtype}, expected float32")


def _require(message: Message, holds: bool, problem: str) -> None:
    if not holds:
        client = getattr(message, "client", None)
        where = "" if client is None else f" of client {client} in round {getattr(message, 'round_index', None)}"
        raise SplitError(f"{type(message).__name__}{where}: {problem}")
