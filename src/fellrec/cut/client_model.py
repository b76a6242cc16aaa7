"""The client's part of a model whose body is on a server, with the parameters of one client on both sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fellrec.cut.link import ServerLink
from fellrec.cut.messages import ChangeBase, CloseSlot, OpenSlot, Serve, SlotClosed, Step, StopServing
from fellrec.errors import SplitError
from fellrec.federated.client_model import WholeClientModel
from fellrec.federated.records import Job, ScoreJob
from fellrec.federated.slot import LocalSlot, Slot
from fellrec.federated.slot_state import SlotState
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import PUBLIC


class CutClientModel:
    """Head and tail here, the body on a server.

    Args:
        client: Holds head and tail.
        link: To the server.
        head_layers: Layers in the head of each client.
    """

    def __init__(self, client: WholeClientModel, link: ServerLink, head_layers: Sequence[int]) -> None:
        self.client = client
        self.link = link
        self.head_layers = head_layers
        self._model = client.module.model
        self._num_changes = 0

    @contextmanager
    def training(self, job: Job, total_steps: int = 0) -> Iterator[Slot]:
        """See ``ClientModel``; a failure here drops the client's training on the server."""
        begin, where = SlotState.of(job, total_steps), (job.row, job.round_index, "train")
        depth = self._depth_of(job.data_of)
        own, body = self._divide(begin, depth)
        self._change_base(job.base)
        tensors = body.adapter, body.optimizer, body.anchors, body.tensors
        self.link.send(OpenSlot(*where, *tensors, body.trains, len(job.base), total_steps, depth))
        with self.link.on_behalf_of(*where), self._model.at_depth(depth):
            try:
                with self.client.slot(own, own.adapter) as slot:
                    yield CutSlot(slot, self.link, where)
            except SplitError:
                raise
            except BaseException:
                self.link.send(CloseSlot(*where, keep=False))
                raise

    @contextmanager
    def evaluating(self, job: ScoreJob, stage: str, round_index: int) -> Iterator[None]:
        """See ``ClientModel``."""
        begin, where = SlotState(job.adapter.tensors(), trains=()), (job.row, round_index, stage)
        depth = self._depth_of(job.clients[0])
        own, body = self._divide(begin, depth)
        self._change_base(job.base)
        self.link.send(Serve(*where, body.adapter, len(job.base), depth))
        with self.link.on_behalf_of(*where), self._model.at_depth(depth), self.client.holding(own, own.adapter):
            yield
        self.link.send(StopServing(*where))

    def traffic(self, job: Job) -> tuple[tuple[Any, ...], ...]:
        """See ``ClientModel``."""
        return self.link.ledger.rows_of(job.row, job.round_index)

    def _depth_of(self, client: int | None) -> int:
        """Layers of the head of a client; the smallest number for pooled data and for the server's own training."""
        return min(self.head_layers) if client is None or client == PUBLIC else self.head_layers[client]

    def _divide(self, begin: SlotState, head_layers: int) -> tuple[SlotState, SlotState]:
        """The client's and the server's part."""
        cut = self._model.cuts[head_layers]
        at_server = {name for name in begin.adapter if cut.part_of(name, self._model.arch) == "body"}
        own = [name for name in self.client.module.trainable if name not in at_server]
        return begin.part(own), begin.part([name for name in begin.adapter if name in at_server])

    def _change_base(self, changes: tuple[StoredTensors, ...]) -> None:
        self.client.use_base(changes)
        for version in range(self._num_changes, len(changes)):
            factors = changes[version].tensors()
            others = {key: t for key, t in factors.items() if self._model.part_of(key.partition("|")[0]) == "body"}
            self.link.send(ChangeBase(version, others))
        self._num_changes = max(self._num_changes, len(changes))


class CutSlot:
    """A client's parameters on both sides of the cut.

    Args:
        own: Head and tail.
        link: To the server, which has the body's slot.
        where: Row, round and phase of the client.
    """

    second = None

    def __init__(self, own: LocalSlot, link: ServerLink, where: tuple[int, int, str]) -> None:
        self.own = own
        self.link = link
        self.where = where

    def before_backward(self, wants_norms: bool, learning_rate: float) -> None:
        """The norms of the body's gradients come with the last gradient of a step."""
        self.own.before_backward(wants_norms, learning_rate)
        self.link.wants_norms = wants_norms
        self.link.learning_rate = learning_rate if wants_norms and self.own.terms else None
        self.link.norms = {}

    def norms(self) -> dict[str, float]:
        """See ``Slot``."""
        return self.own.norms() | self.link.norms

    def step(self, clip_factor: float, learning_rate: float) -> None:
        """See ``Slot``."""
        self.own.step(clip_factor, learning_rate)
        self.link.send(Step(*self.where, clip_factor, learning_rate))

    def state(self) -> SlotState:
        """See ``Slot``; ends the client's training on the server."""
        closed = self.link.request(CloseSlot(*self.where))
        if not isinstance(closed, SlotClosed):
            raise SplitError(f"unexpected message {type(closed).__name__} at the end of a client's training")
        return self.own.state().joined(closed.state)
