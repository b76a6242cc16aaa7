"""What the coordinator and its workers send each other.

The coordinator holds all state and workers none: what a worker needs for a client comes with the message, and goes back
with the answer. So a run can be resumed with another number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fellrec.distributed.message import Message, require
from fellrec.federated.ledger import check_rows
from fellrec.federated.settings import TrainerSettings
from fellrec.functional.ranges import ranges
from fellrec.types import PUBLIC

Rows = tuple[tuple[int | str, ...], ...]
"""Rows of a ledger."""


@dataclass(frozen=True)
class Begin(Message):
    """From the coordinator at the beginning of a run; ``Begun`` answers.

    Every process has composed the command's configurations itself; no path or class comes with a message, and no
    setting but the choice of the coordinator for ``auto``.

    Attributes:
        number: Of the run among the command's, from 0.
        fingerprint: What all processes must agree on, as text.
        backbone: Key of the backbone in the cache, for a server that loads it from there; empty without one.
        num_rows: Rows of the population.
        precision: Where the process's own configuration has ``trainer.precision=auto``.
        attention: Where it has ``trainer.attention=auto``.
    """

    number: int
    fingerprint: Mapping[str, str]
    backbone: str = ""
    num_rows: int = 0
    precision: str = "32-true"
    attention: str = "sdpa"

    def __post_init__(self) -> None:
        require(self, self.number >= 0 and self.num_rows >= 0, "its numbers are negative")
        for name in ("precision", "attention"):
            value = getattr(self, name)
            require(self, ranges(TrainerSettings)[name].accepts(value), f"{name}={value[:100]!r} is not known")


@dataclass(frozen=True)
class Begun(Message):
    """The model is loaded, and the fingerprints agree.

    Attributes:
        adapter: The body's initial adapter, from the server of an executed cut.
    """

    adapter: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainClient(Message):
    """In ``TrainClients``: one client; ``ClientTrained`` or ``ClientFailed`` is its outcome. See ``Job``.

    Attributes:
        row: Row of the population.
        data_of: As in ``Job``.
        round_index: From 0.
        first_step: Optimiser steps of this row in earlier rounds.
        adapter: By parameter.
        optimizer: By ``parameter|key``.
        anchors: By name and parameter.
        tensors: By ``name|parameter``.
        trains: Names of the trained parameters; ``None`` for all.
        needs_start_loss: Whether the loss at ``adapter`` is measured.
        base: Number of changes of the base that must be applied.
        changes: Those of them that this worker has not been sent yet, in order.
    """

    row: int
    data_of: int | None
    round_index: int
    first_step: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    anchors: Mapping[str, Mapping[str, Tensor]]
    tensors: Mapping[str, Tensor]
    trains: tuple[str, ...] | None
    needs_start_loss: bool
    base: int
    changes: tuple[Mapping[str, Tensor], ...]

    def __post_init__(self) -> None:
        require(self, self.data_of is None or self.data_of >= PUBLIC, f"data of client {self.data_of}")
        require(self, min(self.row, self.round_index, self.first_step, self.base) >= 0, "its numbers are negative")


@dataclass(frozen=True)
class ClientTrained(Message):
    """A worker's result, see ``Trained``, whose names it has.

    Attributes:
        row: Row of the population.
        adapter: By parameter.
        optimizer: By ``parameter|key``.
        tensors: By ``name|parameter``.
        step_losses: Of each optimiser step.
        ledger: Rows of the worker's ledger since it was last sent.
    """

    row: int
    adapter: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    tensors: Mapping[str, Tensor]
    loss: float
    num_samples: int
    num_steps: int
    seconds: float
    start_loss: float | None
    peak_bytes: int
    traffic: Rows
    step_losses: tuple[float, ...]
    ledger: Rows = ()

    def __post_init__(self) -> None:
        numbers = (self.row, self.num_samples, self.num_steps, self.seconds, self.peak_bytes)
        require(self, min(numbers) >= 0, "its numbers are negative")
        require(self, check_rows((*self.traffic, *self.ledger)), "its rows are none of a ledger")


@dataclass(frozen=True)
class ClientFailed(Message):
    """A client's local training failed.

    Attributes:
        row: Row of the population.
        reason: One sentence for the user.
        ledger: As in ``ClientTrained``.
    """

    row: int
    reason: str
    ledger: Rows = ()

    def __post_init__(self) -> None:
        require(self, check_rows(self.ledger), "its rows are none of a ledger")


@dataclass(frozen=True)
class TrainClients(Message):
    """To a worker: train these clients at once; ``ClientsTrained`` answers.

    Attributes:
        clients: At least one.
    """

    clients: tuple[TrainClient, ...]

    def __post_init__(self) -> None:
        require(self, len(self.clients) > 0, "it names no client")


@dataclass(frozen=True)
class ClientsTrained(Message):
    """A worker's results.

    Attributes:
        outcomes: In the order of ``TrainClients.clients``.
    """

    outcomes: tuple[ClientTrained | ClientFailed, ...]


@dataclass(frozen=True)
class MeasureLosses(Message):
    """To a worker: measure the loss of these adapters; ``LossesMeasured`` answers. See ``LossJob``.

    Attributes:
        row: Row of the population.
        data_of: As in ``TrainClient``.
        round_index: From 0.
        adapters: Each by parameter.
        base: As in ``TrainClient``.
        changes: As in ``TrainClient``.
    """

    row: int
    data_of: int | None
    round_index: int
    adapters: tuple[Mapping[str, Tensor], ...]
    base: int
    changes: tuple[Mapping[str, Tensor], ...]

    def __post_init__(self) -> None:
        require(self, self.data_of is None or self.data_of >= PUBLIC, f"data of client {self.data_of}")
        require(self, min(self.row, self.round_index, self.base) >= 0, "its numbers are negative")


@dataclass(frozen=True)
class LossesMeasured(Message):
    """Losses of adapters.

    Attributes:
        row: Row of the population.
        losses: In the order of ``MeasureLosses.adapters``; NaN if the client failed.
        ledger: As in ``ClientTrained``.
    """

    row: int
    losses: tuple[float, ...]
    ledger: Rows = ()

    def __post_init__(self) -> None:
        require(self, self.row >= 0, "its row is negative")
        require(self, check_rows(self.ledger), "its rows are none of a ledger")


@dataclass(frozen=True)
class ScoreClients(Message):
    """To a worker: rank all items for the users of some clients; ``Scored`` answers. See ``ScoreJob``.

    Attributes:
        row: Row of the population that the adapter belongs to.
        adapter: By parameter.
        clients: Whose users are ranked.
        stage: ``"val"`` or ``"test"``.
        round_index: The round that the adapter comes from.
        part: Of the users' batches, those whose number leaves this remainder when divided by ``num_parts``.
        num_parts: Processes among which these users are divided.
        base: As in ``TrainClient``.
        changes: As in ``TrainClient``.
    """

    row: int
    adapter: Mapping[str, Tensor]
    clients: tuple[int, ...]
    stage: str
    round_index: int
    part: int
    num_parts: int
    base: int
    changes: tuple[Mapping[str, Tensor], ...]

    def __post_init__(self) -> None:
        require(self, self.stage in ("val", "test"), f"stage {self.stage!r} must be val or test")
        require(self, 0 <= self.part < self.num_parts, f"part {self.part} of {self.num_parts}")
        require(self, min(self.row, self.base, *self.clients, 0) >= 0, "its numbers are negative")


@dataclass(frozen=True)
class Scored(Message):
    """Metrics of single users.

    Attributes:
        users: From ``FellrecModule.take_users``: metrics of users for each of the ranker's choices.
        ledger: As in ``ClientTrained``.
    """

    users: tuple[tuple[Tensor, ...], ...]
    ledger: Rows = ()

    def __post_init__(self) -> None:
        require(self, check_rows(self.ledger), "its rows are none of a ledger")
