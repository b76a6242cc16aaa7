"""What leaves the clients after local training, and what comes back: payloads, transforms, and their real sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fellrec.errors import TrainingError
from fellrec.federated.ledger import Ledger
from fellrec.federated.poison import Poison
from fellrec.federated.privacy import PrivateMean
from fellrec.federated.ranks import Ranks
from fellrec.federated.records import Aggregated, Failed, LoraLayer, LossJob, Received, SumsOnly, Trained, Updates
from fellrec.federated.secure_sum import SecureSum
from fellrec.federated.settings import ExchangeSettings
from fellrec.functional.stacks import AdapterStack, Repeated, RowStack, as_lazy, first_row
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import Adapter

_SCALAR_BYTES = 8
"""A float64 or int64."""

Opened = Callable[[], Adapter]
"""Gives what arrived of a client, by parameter."""

Meter = Callable[[float], Mapping[str, float]]
"""Gives figures of the processes for a round that took so many seconds."""


class Rule(Protocol):
    """What the exchange must know of an aggregation rule."""

    sees: str
    """What the rule reads: ``"nothing"`` of the adapters, ``"sums"`` of them only, or all ``"adapters"``."""
    client_tensors: Sequence[str]
    """Names of the clients' tensors that are sent with each update."""

    @property
    def name(self) -> str:
        """For error messages."""

    def exchanges(self, name: str, round_index: int) -> bool:
        """Whether a parameter leaves the clients in a round."""


class Transform:
    """Base of what changes a client's update before it is sent: clipping, noise, quantisation, sparsification.

    Transforms form a chain: the payload of one is the input of the next. The receiver decodes in reverse order. A
    transform that remembers something of a client (error feedback) keeps it by row and overrides `state_dict`. Entries
    of a payload are named by the parameter, or ``parameter|what`` if it has several.
    """

    def encode(self, payload: Mapping[str, Tensor], row: int, round_index: int) -> Mapping[str, Tensor]:
        """The payload to be sent instead, by name; names may differ from those of the input."""
        return payload

    def decode(self, payload: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The input of ``encode`` as far as the payload has it."""
        return payload

    def state_dict(self) -> dict[str, Any]:
        """See ``Persisted``."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Persisted``."""


class Exchange:
    """Moves updates from the clients to the rule, and the result back; records the bytes of both.

    Without transforms a client sends its adapter as it is. With transforms it sends its encoded update, the adapter
    after training minus the received one, and the rule sees the received adapter plus the decoded update.

    Args:
        rule: Says what it reads and which parameters are exchanged.
        ledger: Records what crosses between clients and server.
        transforms: Applied to every client's update, in this order.
        at_server: Whether a row's parameter is on a server that trains it for the client (the body of an executed
            cut): it need not be sent.
        meters: Give further figures of a round.
        layers: Layers that LoRA adapts, for the rule.
        num_clients: C, for the rule.
        ranks: LoRA ranks of the clients, if they differ: a client sends and receives the part of its rank.
        privacy: Gives the rule a noised mean of the updates instead of the updates.
        poison: Clients that send something else than what they trained; ``None`` for none.
        secure: Settings of secure sums; ``None`` for none.
    """

    def __init__(
        self,
        rule: Rule,
        ledger: Ledger,
        transforms: Sequence[Transform] = (),
        at_server: Callable[[int, str], bool] = lambda row, name: False,
        meters: Sequence[Meter] = (),
        layers: Sequence[LoraLayer] = (),
        num_clients: int = 0,
        ranks: Ranks | None = None,
        privacy: PrivateMean | None = None,
        poison: Poison | None = None,
        secure: ExchangeSettings | None = None,
    ) -> None:
        self.poison = poison
        self.secure = secure
        self.rule = rule
        self.ledger = ledger
        self.privacy = privacy
        self.transforms = list(transforms)
        self.at_server = at_server
        self.meters = list(meters)
        self.layers = tuple(layers)
        self.num_clients = num_clients
        self.ranks = ranks
        self._received: Adapter = {}
        self._arrived: set[tuple[int, int]] = set()

    def measured(self, jobs: Sequence[LossJob]) -> None:
        """Record what clients received and returned to measure losses; their own adapter is not sent."""
        for job in jobs:
            num_bytes = sum(self._num_bytes(job.row, adapter.tensors()) for adapter in job.sent)
            self.ledger.add(job.row, job.round_index, "train", "down", "adapter", num_bytes)
            num_scalars = len(job.adapters)
            self.ledger.add(job.row, job.round_index, "train", "up", "scalar", num_scalars * _SCALAR_BYTES)

    def sent(self, outcomes: Sequence[Trained | Failed], is_exchanged: Callable[[int], bool]) -> list[Trained | Failed]:
        """What clients send of what they trained; what a client that misbehaves sends is replaced or refused.

        Args:
            outcomes: What they trained.
            is_exchanged: Whether a row's adapter is sent.
        """
        if self.poison is None or self.rule.sees == "nothing":
            return list(outcomes)

        def leaving(trained: Trained) -> dict[str, Tensor]:
            """What leaves a client; nothing of a row that is not sent."""
            tensors = trained.adapter.tensors() if is_exchanged(trained.row) else {}
            kept = {name: t for name, t in tensors.items() if self._leaves(name, trained)}
            return {name: t for name, t in kept.items() if not self.at_server(trained.row, name)}

        return self.poison.sent(outcomes, leaving, self.ranks)

    def up(
        self,
        trained: Sequence[Trained],
        model: Adapter,
        root: Trained | None = None,
        started: Sequence[int] = (),
        absent: Sequence[int] = (),
    ) -> Updates:
        """What the rule sees of the clients that finished a round; the bytes that they send are recorded.

        Args:
            trained: What they returned.
            model: The server's model, which they received, or of which they received earlier versions; see
                ``Population.model``.
            root: The server's own training, which sends nothing.
            started: Rows that began the round, whether or not they finished, for what privacy costs.
            absent: Clients that were drawn and did not begin, for secure sums.

        Raises:
            TrainingError: If an adapter is not finite, or too few clients are left for a secure sum.
        """
        round_index, first = trained[0].job.round_index, trained[0].adapter.tensors()
        names = [name for name in first if self._leaves(name, trained[0])]
        shapes = {name: first[name].shape for name in names}
        self._received = first
        start_losses = [t.start_loss for t in trained if t.start_loss is not None]
        starts, ends = [t.job.adapter.tensors for t in trained], [self._sent(t, names) for t in trained]
        updates = Updates(
            clients=tuple(t.row for t in trained),
            start=RowStack(shapes, starts),
            end=RowStack(shapes, ends),
            losses=torch.tensor([t.loss for t in trained], dtype=torch.float64),
            num_samples=torch.tensor([t.num_samples for t in trained], dtype=torch.float64),
            start_losses=torch.tensor(start_losses, dtype=torch.float64) if start_losses else None,
            start_rounds=tuple(t.job.round_index for t in trained),
            tensors={name: _stack_of([t.tensors for t in trained], name) for name in self._sent_tensors(trained)},
            start_tensors={name: _started(trained, name) for name in self._sent_tensors(trained)},
            num_steps=torch.tensor([t.num_steps for t in trained], dtype=torch.float64),
            num_clients=self.num_clients,
            layers=self.layers,
            model=model,
            ranks=None if self.ranks is None else torch.tensor([self.ranks.of_row(t.row) for t in trained]),
            root={} if root is None else {name: root.adapter.tensors()[name] for name in names},
        )
        self._arrived = {(t.row, t.job.round_index) for t in trained}
        if self.privacy is not None:
            updates = self._noised(self.privacy, updates, ends, [*started, *updates.clients])
        updates.check_finite(round_index)
        if self.rule.sees != "sums":
            return updates
        secure = None
        if self.secure is not None:
            record = partial(self._record, round_index)
            away = sorted({*absent, *(row for row in started if row < self.num_clients)} - {*updates.clients})
            how = self.rule.name, shapes, updates.clients, starts, ends, away, self.secure, record
            secure = SecureSum(*how)
        hidden = SumsOnly(updates.start, self.rule.name), SumsOnly(updates.end, self.rule.name, secure)
        return replace(updates, start=hidden[0], end=hidden[1])

    def _record(self, round_index: int, row: int, direction: str, kind: str, num_bytes: int) -> None:
        self.ledger.add(row, round_index, "train", direction, kind, num_bytes)

    def down(self, updates: Updates, aggregated: Aggregated) -> Received:
        """What the clients receive; the bytes that they receive are recorded.

        Raises:
            TrainingError: If the rule returned something else.
        """
        if not isinstance(aggregated, Aggregated):
            raise TrainingError(
                f"aggregation {self.rule.name}: aggregate returned {type(aggregated).__name__}; needed is Aggregated"
            )
        received = Received(
            updates.clients,
            aggregated.adapters,
            aggregated.tensors,
            aggregated.base,
            aggregated.resets,
            aggregated.anchors,
            aggregated.ranks,
        )
        if self.rule.sees != "nothing":
            sizes = [
                (name, stack[name].nbytes // len(stack[name]))
                for stack in aggregated.tensors.values()
                for name in stack
            ]
            for row, round_index in zip(updates.clients, updates.start_rounds, strict=True):
                num_bytes = sum(size for name, size in sizes if not self.at_server(row, name))
                num_bytes += self._num_bytes(row, aggregated.base)
                num_bytes += sum(self._num_bytes(row, anchor) for anchor in aggregated.anchors.values())
                for name in self._sent_back(row, aggregated):
                    num_bytes += self._part(row, name, self._received[name]).nbytes
                self.ledger.add(row, round_index, "train", "down", "adapter", num_bytes)
        return received

    def costs(self, round_index: int, seconds: float) -> dict[str, float]:
        """Bytes of a round by kind, and the meters' figures."""
        figures: dict[str, float] = {}
        for meter in self.meters:
            figures |= meter(seconds)
        private = {} if self.privacy is None else self.privacy.costs()
        return figures | private | self.ledger.metrics(round_index, self._arrived)

    def state_dict(self) -> dict[str, Any]:
        """See ``Persisted``."""
        private = {} if self.privacy is None else {"privacy": self.privacy.state_dict()}
        return {str(place): transform.state_dict() for place, transform in enumerate(self.transforms)} | private

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Persisted``."""
        for place, transform in enumerate(self.transforms):
            transform.load_state_dict(state.get(str(place), {}))
        if self.privacy is not None:
            self.privacy.load_state_dict(state["privacy"])

    def _noised(
        self, privacy: PrivateMean, updates: Updates, sent: Sequence[Opened], started: Sequence[int]
    ) -> Updates:
        """Updates of which each is the noised mean of all, and of which nothing else depends on a client's data.

        Raises:
            TrainingError: If clients started the round with different adapters.
        """
        updates.check_common_start(self.rule.name)
        first, num = first_row(updates.start), len(updates.clients)
        deltas = ({name: adapter[name] - start for name, start in first.items()} for adapter in (row() for row in sent))
        mean = privacy.mean(deltas, started, max(updates.start_rounds))
        moved = {name: (start.double() + mean[name]).to(start.dtype) for name, start in first.items()}
        return replace(
            updates,
            end=Repeated(moved, num),
            losses=torch.full((num,), torch.nan, dtype=torch.float64),
            num_samples=torch.ones(num, dtype=torch.float64),
            start_losses=None,
            tensors={},
            start_tensors={},
            num_steps=None,
        )

    def _sent_back(self, row: int, aggregated: Aggregated) -> set[str]:
        """Parameters of which a client receives values."""
        return {name for name in as_lazy(aggregated.adapters) if not self.at_server(row, name)} & set(self._received)

    def _num_bytes(self, row: int, payload: Mapping[str, Tensor]) -> int:
        """Bytes of a payload without the entries of parameters that the server trains for the client."""
        return sum(t.nbytes for key, t in payload.items() if not self.at_server(row, key.partition("|")[0]))

    def _part(self, row: int, name: str, tensor: Tensor) -> Tensor:
        """What a client sends or receives of a parameter."""
        return tensor if self.ranks is None else self.ranks.narrow(row, name, tensor)

    def _leaves(self, name: str, trained: Trained) -> bool:
        trains = trained.job.trains
        return (trains is None or name in trains) and self.rule.exchanges(name, trained.job.round_index)

    def _sent(self, trained: Trained, names: Sequence[str]) -> Opened:
        """Let a client send its update, and give what the receiver makes of it."""
        if self.rule.sees == "nothing":
            return trained.adapter.tensors
        row, round_index, end = trained.row, trained.job.round_index, trained.adapter.tensors()
        payload: Mapping[str, Tensor] = {name: self._part(row, name, end[name]) for name in names}
        opened = trained.adapter.tensors
        if self.transforms:
            start = trained.job.adapter.tensors()
            payload = {name: self._part(row, name, end[name] - start[name]) for name in names}
            for transform in self.transforms:
                payload = transform.encode(payload, row, round_index)
            decoded = payload
            for transform in reversed(self.transforms):
                decoded = transform.decode(decoded)
            arrived = {name: start[name] + self._decoded(decoded, row, name, start[name]) for name in names}
            opened = StoredTensors(arrived).tensors
        num_bytes = self._num_bytes(row, payload)
        for name in self.rule.client_tensors:
            num_bytes += self._num_bytes(row, _tensors_of(trained.tensors, name))
        num_scalars = 2 if trained.start_loss is None else 3
        if self.secure is None:  # otherwise the update is sent masked
            self.ledger.add(row, round_index, "train", "up", "adapter", num_bytes)
        self.ledger.add(row, round_index, "train", "up", "scalar", num_scalars * _SCALAR_BYTES)
        return opened

    def _sent_tensors(self, trained: Sequence[Trained]) -> list[str]:
        """Names of the tensors that the rule reads and all clients have."""
        return [name for name in self.rule.client_tensors if all(_tensors_of(t.tensors, name) for t in trained)]

    def _decoded(self, decoded: Mapping[str, Tensor], row: int, name: str, whole: Tensor) -> Tensor:
        """What the transforms made of a parameter's update, with zeros beyond the client's rank."""
        like = self._part(row, name, whole)
        if name not in decoded or decoded[name].shape != like.shape:
            found = f"shape {list(decoded[name].shape)}" if name in decoded else "nothing"
            chain = " and ".join(type(transform).__name__ for transform in self.transforms)
            raise TrainingError(f"{chain} decoded {found} for {name}, expected shape {list(like.shape)}")
        part = decoded[name].to(like.dtype)
        return part if self.ranks is None else self.ranks.padded(name, part, whole)


def _tensors_of(stored: StoredTensors, name: str) -> Adapter:
    """A client's own tensors of one name, by parameter."""
    return {key.partition("|")[2]: t for key, t in stored.tensors().items() if key.partition("|")[0] == name}


def _stack_of(stored: Sequence[StoredTensors], name: str) -> AdapterStack:
    """The clients' own tensors of one name, parameter → ``[N, *shape]``."""
    rows = [partial(_tensors_of, tensors, name) for tensors in stored]
    return RowStack({key: tensor.shape for key, tensor in rows[0]().items()}, rows)


def _started(trained: Sequence[Trained], name: str) -> AdapterStack:
    """The same before local training, with zeros for those that are new."""

    def opened(t: Trained) -> Adapter:
        """A client's tensors that it received."""
        before = _tensors_of(t.job.tensors, name)
        return {key: before.get(key, torch.zeros_like(now)) for key, now in _tensors_of(t.tensors, name).items()}

    shapes = {key: tensor.shape for key, tensor in _tensors_of(trained[0].tensors, name).items()}
    return RowStack(shapes, [partial(opened, t) for t in trained])
