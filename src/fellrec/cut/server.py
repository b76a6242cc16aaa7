"""The server: the body, every client's body adapter, and the aggregation. It answers messages and starts nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache

from fellrec.cut.messages import (
    Aggregate,
    ClientMessage,
    Done,
    Download,
    DropCache,
    Fetch,
    Finish,
    Gradient,
    GradientReply,
    HiddenReply,
    HiddenState,
    KeepBest,
    LoadState,
    Message,
    Mixed,
    Report,
    SaveAdapters,
    SaveState,
    SelectRows,
    Step,
    Upload,
)
from fellrec.distributed.memory import peak_bytes
from fellrec.errors import SplitError
from fellrec.federated.checkpoint import load_state, save_state
from fellrec.federated.slot import AdapterSlot
from fellrec.federated.state import RunState
from fellrec.functional.packing import Packed, pack, unpack
from fellrec.models.module import OptimizerSettings
from fellrec.models.parameter_swap import ParameterSwap
from fellrec.models.split import SplitModel
from fellrec.models.streams import StreamPosition, training_seed
from fellrec.state.bank import AdapterBank
from fellrec.types import Updates

if TYPE_CHECKING:
    from fellrec.aggregation.base import AggregationCallback

CHECKPOINTS = "checkpoints-server"
"""Folder of the server's checkpoints in the run's directory."""
ADAPTERS = "server.safetensors"
"""File of the server's share of the selected adapters."""


@dataclass(frozen=True)
class ServerSettings:
    """What the server must know to do its half of the training.

    Attributes:
        seed: Of the run.
        optimizer: AdamW's settings for the body's adapters.
        reset_optimizer: Forget a client's optimiser state at the start of a round.
        hidden_dtype: Packing of hidden states, see ``fellrec.functional.packing``.
        gradient_dtype: Packing of gradients.
        checkpoints_kept: Checkpoints that stay on disk.
    """

    seed: int
    optimizer: OptimizerSettings
    reset_optimizer: bool = False
    hidden_dtype: str = "float32"
    gradient_dtype: str = "float32"
    checkpoints_kept: int = 2


@dataclass
class _Job:
    """A client that is being trained."""

    slot: AdapterSlot
    start: dict[str, Tensor]
    graphs: dict[int, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)


class BodyServer:
    """Runs the body for all clients, each with its own adapter, and mixes adapters.

    What it holds: the body's weights, the body adapters with their optimiser states, and the head and tail adapters
    that clients uploaded for aggregation. What it is told: ``fellrec.cut.messages``, and nothing else.

    Args:
        model: The server's share of the backbone.
        trainable: The body's adapter in it; may be empty.
        state: Of the body's adapters.
        rule: The aggregation rule.
        settings: See ``ServerSettings``.
        autocast: Makes the precision's context.
    """

    def __init__(
        self,
        model: SplitModel,
        trainable: dict[str, nn.Parameter],
        state: RunState,
        rule: AggregationCallback,
        settings: ServerSettings,
        autocast: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        self.model = model
        self.trainable = trainable
        self.state = state
        self.rule = rule
        self.settings = settings
        self.busy_seconds = 0.0
        self._autocast = autocast
        self._swap = ParameterSwap(model.model, trainable)
        self._jobs: dict[int, _Job] = {}
        self._finished: dict[int, tuple[dict[str, Tensor], Finish]] = {}
        self._uploads: dict[int, Mapping[str, Tensor]] = {}
        self._client_bank: AdapterBank | None = None
        self._caches: dict[tuple[int, int], Cache] = {}
        self._in_place: tuple[str, int] | None = None
        self._is_training = True
        first = next(model.parameters())
        self._device, self._dtype = first.device, first.dtype
        self._width = int(model.model.config.hidden_size)
        self._handlers: dict[type[Message], Callable[[Any], Message | None]] = {
            HiddenState: self._hidden_state,
            Gradient: self._gradient,
            Step: self._step,
            Finish: self._finish,
            Upload: self._upload,
            Fetch: self._fetch,
            SelectRows: self._select_rows,
            DropCache: self._drop_cache,
            Aggregate: self._aggregate,
            KeepBest: self._keep_best,
            SaveState: self._save,
            LoadState: self._load,
            SaveAdapters: self._save_adapters,
            Report: lambda message: self.report(),
        }

    def handle(self, message: Message) -> Message | None:
        """Do what a message asks for.

        Returns:
            The answer, if the message has one.

        Raises:
            SplitError: If the message does not fit: another hidden size, an unknown client, a gradient of nothing.
            TrainingError: If an adapter is no longer finite.
        """
        handler = self._handlers.get(type(message))
        if handler is None:
            raise SplitError(f"the server has no use for {type(message).__name__}")
        if isinstance(message, ClientMessage) and message.client >= self.num_clients:
            raise SplitError(f"{_name(message)}: there are {self.num_clients} clients")
        started = time.perf_counter()
        reply = handler(message)
        self.busy_seconds += time.perf_counter() - started
        return reply

    @property
    def num_clients(self) -> int:
        """Rows of the population's adapters."""
        return len(self.state.local_steps)

    def _hidden_state(self, message: HiddenState) -> Message:
        for packed in message.hidden:
            if packed.shape[-1] != self._width:
                raise SplitError(
                    f"{_name(message)}: its hidden size is {packed.shape[-1]}, the body's is {self._width}"
                )
        if message.phase == "train":
            outputs = self._forward(message)
        else:
            with torch.no_grad():
                outputs = [self._evaluate(message, packed) for packed in message.hidden]
        packed_outputs = tuple(pack(output, self.settings.hidden_dtype) for output in outputs)
        return HiddenReply(message.client, message.round_index, message.phase, message.ticket, packed_outputs)

    def _forward(self, message: HiddenState) -> list[Tensor]:
        job = self._job(message)
        self._set_mode(is_training=True)
        inputs = [self._unpack(packed).requires_grad_(message.needs_gradient) for packed in message.hidden]
        with self._swap.using(job.slot.parameters), self.model.streams.using(job.slot.streams), self._autocast():
            outputs = [self.model.body(hidden_BLD, message.mask) for hidden_BLD in inputs]
        job.graphs[message.ticket] = (inputs, outputs)
        return outputs

    def _evaluate(self, message: HiddenState, packed: Packed) -> Tensor:
        self._set_mode(is_training=False)
        self._put_in_place(message.bank, message.client)
        mask = None if message.mask is None else message.mask.to(self._device)
        cache = None if message.cache is None else self._cache(message.client, message.cache)
        with self._autocast(), self.model.without_lora() if message.without_lora else nullcontext():
            return self.model.serve_body(self._unpack(packed), mask, message.positions, cache)

    def _gradient(self, message: Gradient) -> Message:
        job = self._jobs.get(message.client)
        if job is None or message.ticket not in job.graphs:
            raise SplitError(f"{_name(message)}: there is no forward pass {message.ticket} that it could belong to")
        inputs, outputs = job.graphs.pop(message.ticket)
        shapes = [list(packed.shape) for packed in message.gradient]
        if shapes != [list(output.shape) for output in outputs]:
            raise SplitError(f"{_name(message)}: its shapes {shapes} are not those of the forward pass")
        wanted = [hidden for hidden in inputs if hidden.requires_grad]
        parameters = list(job.slot.parameters.values())
        found = torch.autograd.grad(
            outputs, [*wanted, *parameters], [self._unpack(g, o.dtype) for g, o in zip(message.gradient, outputs)],
            allow_unused=True,
        )  # fmt: skip
        job.slot.add_gradients(found[len(wanted) :])
        gradient = tuple(pack(value, self.settings.gradient_dtype) for value in found[: len(wanted)])
        norms = job.slot.norms() if message.wants_norms else None
        return GradientReply(message.client, message.round_index, message.phase, message.ticket, gradient, norms)

    def _step(self, message: Step) -> None:
        job = self._jobs.get(message.client)
        if job is None:
            raise SplitError(f"{_name(message)}: the client is not being trained")
        job.slot.step(message.clip_factor, message.learning_rate)
        self.state.local_steps[message.client] += 1

    def _finish(self, message: Finish) -> None:
        job = self._jobs.pop(message.client, None)
        if job is None:
            return
        if message.keep:
            self.state.keep_optimizer(message.client, job.slot.optimizer_state())
            self.state.bank.store(message.client, job.slot.parameters)
            self._finished[message.client] = (job.start, message)
            self._in_place = None

    def _upload(self, message: Upload) -> None:
        if not self.rule.exchanges_adapters:
            raise SplitError(f"{_name(message)}: aggregation {self.rule.name} does not mix, no adapter may leave")
        if message.round_index < 0:  # the start that all clients share
            self._client_bank = AdapterBank.replicate(message.adapter, self.num_clients)
        else:
            self._uploads[message.client] = message.adapter

    def _fetch(self, message: Fetch) -> Message:
        if self._client_bank is None:
            raise SplitError(f"{_name(message)}: no head and tail adapters were uploaded")
        adapter = {name: tensor.clone() for name, tensor in self._client_bank.row(message.client).items()}
        return Download(message.client, message.round_index, message.phase, adapter)

    def lacks(self, message: Message) -> list[int]:
        """The clients whose adapters a message needs and that have not come yet, perhaps over another line."""
        clients = message.clients if isinstance(message, Aggregate) else ()
        return [client for client in clients if client not in self._finished or client not in self._uploads]

    def forget(self, clients: Iterable[int]) -> None:
        """Drop what is under way for clients whose process is gone; what they finished and sent up is complete."""
        for client in clients:
            self._jobs.pop(client, None)
            if client not in self._uploads:
                self._finished.pop(client, None)

    def _aggregate(self, message: Aggregate) -> Message:
        clients, missing = message.clients, self.lacks(message)
        if missing or self._client_bank is None:
            raise SplitError(f"round {message.round_index} cannot be aggregated: nothing came from clients {missing}")
        body_start = _stack([self._finished[client][0] for client in clients])
        start = {**body_start, **self._client_bank.stack(clients)}
        end = {**self.state.bank.stack(clients), **_stack([self._uploads[client] for client in clients])}
        reports = [self._finished[client][1] for client in clients]
        updates = Updates(
            clients=clients,
            start={name: start[name] for name in sorted(start)},
            end={name: end[name] for name in sorted(end)},
            losses=torch.tensor([report.loss for report in reports], dtype=torch.float64),
            num_samples=torch.tensor([report.num_samples for report in reports], dtype=torch.float64),
        )
        updates.check_finite(message.round_index)
        aggregated = self.rule.aggregate(updates, message.round_index)
        for bank in (self.state.bank, self._client_bank):
            bank.replace(clients, {name: aggregated.adapters[name] for name in bank.kinds})
        self.state.round_index = message.round_index + 1
        self.state.extras["aggregation"] = self.rule.state_dict()
        self._uploads.clear()
        self._finished.clear()
        self._in_place = None
        return Mixed(dict(aggregated.matrices), dict(aggregated.per_client))

    def _keep_best(self, message: KeepBest) -> None:
        self.state.keep_best(message.population, message.clients, message.rows)
        self._in_place = None

    def _save(self, message: SaveState) -> Message:
        self.state.round_index = message.round_index
        save_state(
            Path(message.run_dir) / CHECKPOINTS, self.state, self._more_tensors(), self.settings.checkpoints_kept
        )
        return self.report()

    def _load(self, message: LoadState) -> Message:
        more = load_state(Path(message.run_dir) / CHECKPOINTS, self.state, message.round_index)
        if more:
            self._client_bank = AdapterBank.from_stack(more)
        self.rule.load_state_dict(self.state.extras.get("aggregation", {}))
        self._in_place = None
        return self.report()

    def _save_adapters(self, message: SaveAdapters) -> Message:
        from safetensors.torch import save_file

        folder = Path(message.folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(dict(self.state.bank_named(message.bank).tensors), folder / ADAPTERS)
        return self.report()

    def report(self) -> Done:
        """Busy seconds and memory so far."""
        return Done(self.busy_seconds, peak_bytes())

    def _more_tensors(self) -> dict[str, Tensor]:
        return {} if self._client_bank is None else self._client_bank.tensors

    def _job(self, message: HiddenState) -> _Job:
        client = message.client
        if client not in self._jobs:
            start = {name: tensor.clone() for name, tensor in self.state.bank.row(client).items()}
            streams = StreamPosition(training_seed(self.settings.seed, message.round_index, client))
            optimizer_state = self.state.take_optimizer(client, self.settings.reset_optimizer)
            slot = AdapterSlot(self.trainable, start, self.settings.optimizer, optimizer_state, streams)
            self._jobs[client] = _Job(slot, start)
        return self._jobs[client]

    def _put_in_place(self, bank: str, client: int) -> None:
        if self._in_place != (bank, client):
            self.state.bank_named(bank).copy_to(self.trainable, client)
            self._in_place = (bank, client)

    def _cache(self, client: int, number: int) -> Cache:
        if (client, number) not in self._caches:
            self._caches[client, number] = self.model.new_cache()
        return self._caches[client, number]

    def _select_rows(self, message: SelectRows) -> None:
        source = self._cache(message.client, message.source)
        if message.target != message.source:
            source = self._caches[message.client, message.target] = self.model.copy_cache(source)
        if message.rows is not None:
            self._check_rows(message, message.rows, source)
            source.batch_select_indices(message.rows.to(self._device))

    def _check_rows(self, message: SelectRows, rows: Tensor, cache: Cache) -> None:
        """Rows are positions in the cache's batch and cannot be anything else, such as token ids."""
        keys: Any = cache.layers[self.model.cut.layers("body").start]
        num_rows = len(keys.keys) if keys.is_initialized else 0
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < num_rows:
            raise SplitError(f"{_name(message)}: its rows are not positions in a batch of {num_rows}")

    def _drop_cache(self, message: DropCache) -> None:
        self._caches.pop((message.client, message.cache), None)

    def _set_mode(self, is_training: bool) -> None:
        if self._is_training != is_training:
            self.model.train(is_training)
            self._is_training = is_training

    def _unpack(self, packed: Packed, dtype: torch.dtype | None = None) -> Tensor:
        return unpack(packed, dtype or self._hidden_dtype(packed), self._device).detach()

    def _hidden_dtype(self, packed: Packed) -> torch.dtype:
        """What the head computed in, so that nothing is lost; packed ones come back in the body's own type."""
        is_plain = packed.scale is None and self.settings.hidden_dtype == "float32"
        return packed.codes.dtype if is_plain else self._dtype


def _stack(adapters: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([adapter[name].cpu() for adapter in adapters]) for name in adapters[0]}


def _name(message: ClientMessage) -> str:
    return f"{type(message).__name__} of client {message.client} in round {message.round_index}"
