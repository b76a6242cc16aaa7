"""Everything a run needs to go on: adapters, optimiser states, position, and the best round so far."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fellrec.data.guards import check_selection
from fellrec.errors import CheckpointError
from fellrec.state.bank import AdapterBank
from fellrec.state.tensor_store import StoredTensors, TensorStore, check_file, open_store
from fellrec.types import ClientUpdate, Evaluation

OptimizerState = dict[str, dict[str, Any]]
"""Parameter name → what the optimiser remembers of it, by its own names."""

log = logging.getLogger(__name__)


@dataclass
class Selection:
    """The best adapters so far on the validation holdout, which is all that selection ever sees.

    Attributes:
        metric: Metric name, higher is better.
        bank: Adapters of the best round of the whole population.
        value: Mean over clients in that round.
        round_index: That round; -1 is the start, before any training.
        client_values: Best value of each client on its own, client → value.
        client_rounds: The round of that value, client → round.
        client_bank: Each client's adapter of its own best round.
    """

    metric: str
    bank: AdapterBank
    client_bank: AdapterBank
    value: float = -float("inf")
    round_index: int = -1
    client_values: list[float] = field(default_factory=list)
    client_rounds: list[int] = field(default_factory=list)


@dataclass
class RunState:
    """State of a federated run between two rounds.

    Attributes:
        bank: Every client's adapter now.
        selection: The best adapters so far.
        initial: The adapter that all clients started with.
        round_index: The next round to run, from 0.
        optimizers: The version of each client's optimiser state, kept across rounds; see ``optimizer_of``.
        local_steps: Optimiser steps each client has taken in all rounds.
        rounds_without_gain: Evaluations since the best one, for early stopping.
        extras: State of the aggregation and of callbacks, by name; plain JSON values.
    """

    bank: AdapterBank
    selection: Selection
    initial: AdapterBank
    round_index: int = 0
    optimizers: dict[int, StoredTensors] = field(default_factory=dict)
    local_steps: list[int] = field(default_factory=list)
    rounds_without_gain: int = 0
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def tensor_store(self) -> TensorStore:
        """Where new versions of adapters and optimiser states go."""
        return self.bank.tensor_store

    def keep_on_disk(self, folder: Path) -> None:
        """Let every new version be a file in ``folder`` rather than stay in memory.

        Raises:
            StorageError: If the folder cannot be written.
        """
        tensor_store = open_store(folder, self.tensor_store.number)
        for bank in (self.bank, self.selection.bank, self.selection.client_bank):
            bank.tensor_store = tensor_store

    def optimizer_of(self, client: int) -> OptimizerState:
        """A copy of what a client's optimiser remembers; empty if it has not trained."""
        state: OptimizerState = {}
        version = self.optimizers.get(client)
        for path, tensor in version.tensors().items() if version else ():
            name, _, key = path.rpartition("|")
            state.setdefault(name, {})[key] = tensor.clone()
        return state

    def take_optimizer(self, client: int, reset: bool = False) -> OptimizerState:
        """A client's optimiser state for its training; an empty one the first time, or if it is to be reset."""
        return {} if reset else self.optimizer_of(client)

    def keep_optimizer(self, client: int, state: OptimizerState, name: str = "") -> None:
        """Remember a copy of a client's optimiser state.

        Raises:
            StorageError: If its file cannot be written.
        """
        tensors = {f"{parameter}|{key}": value for parameter, of in state.items() for key, value in of.items()}
        self.optimizers[client] = self.tensor_store.put(client, tensors, name)

    def finish(self, update: ClientUpdate, adapter: Mapping[str, Tensor], optimizer: OptimizerState) -> None:
        """A client has trained: keep its adapter and its optimiser state.

        On the disk this is all that a resume in the middle of the round needs: the adapter's file says what it was
        made from and holds the update, see ``recover``. The optimiser's comes first, so that it is there.
        """
        client, names, about = update.client, (f"optimizer-{self.round_index:05d}", self._trained_name()), {}
        if self.tensor_store.folder is not None:
            about = {"update": json.dumps(asdict(update)), "made_from": self._made_from(client)}
        self.keep_optimizer(client, optimizer, names[0])
        if self.tensor_store.folder is not None:
            about["optimizer"] = self.optimizers[client].checksum
        self.bank.store(client, adapter, names[1], about)
        self.local_steps[client] += update.num_steps

    def recover(self, client: int) -> ClientUpdate | None:
        """What a run that was stopped in the middle of this round had finished of a client, if anything.

        Returns:
            The client's update, with adapter and optimiser state in place as if it had just trained; ``None`` if it
            has to train: nothing is there, it was made from another adapter, or it is damaged.
        """
        folder = self.tensor_store.folder
        if folder is None or not (path := self.tensor_store.path_of(client, self._trained_name())).is_file():
            return None
        optimizer = self.tensor_store.path_of(client, f"optimizer-{self.round_index:05d}")
        try:
            about, other = check_file(path), check_file(optimizer)
        except CheckpointError as error:
            log.warning("%s; client %d trains again", error, client)
            return None
        if about.get("made_from") != self._made_from(client) or about.get("optimizer") != other["checksum"]:
            return None
        update = ClientUpdate(**json.loads(about["update"]))
        self.optimizers[client] = StoredTensors(path=optimizer, checksum=other["checksum"])
        self.bank.versions[client] = StoredTensors(path=path, checksum=about["checksum"])
        self.local_steps[client] += update.num_steps
        return update

    def _trained_name(self) -> str:
        return f"trained-{self.round_index:05d}"

    def _made_from(self, client: int) -> str:
        """The files that a client's training begins with, by their contents."""
        found = (self.bank.versions[client], self.optimizers.get(client))
        return " ".join(version.checksum for version in found if version)

    def bank_named(self, name: str) -> AdapterBank:
        """``"initial"``, ``"current"``, ``"best"`` (of the population) or ``"best_per_client"``.

        Raises:
            KeyError: For another name.
        """
        banks = {"current": self.bank, "best": self.selection.bank, "best_per_client": self.selection.client_bank}
        return {**banks, "initial": self.initial}[name]

    def keep_best(self, population: bool, clients: tuple[int, ...], rows: tuple[int, ...]) -> None:
        """Remember the current adapters as the best.

        Args:
            population: Whether as the population's.
            clients: Those for which they are the best on their own.
            rows: The row of ``bank`` that serves each of them.
        """
        self.selection.client_bank.share(clients, self.bank, rows)
        if population:
            everybody = range(len(self.bank))
            self.selection.bank.share(everybody, self.bank, everybody)

    def select(self, evaluation: Evaluation, row_of_client: tuple[int, ...]) -> tuple[bool, tuple[int, ...]]:
        """Compare an evaluation with the best so far and keep its adapters if they are better.

        Args:
            evaluation: Validation of all clients with ``bank`` as it is.
            row_of_client: The row of ``bank`` that serves each client.

        Returns:
            Whether the population's mean improved, and the clients who did.

        Raises:
            LeakError: If the evaluation is of another stage.
        """
        check_selection(evaluation.stage)
        selection = self.selection
        values = evaluation.per_client[selection.metric].tolist()
        if not selection.client_values:
            selection.client_values = [-float("inf")] * len(values)
            selection.client_rounds = [-1] * len(values)
        better = tuple(c for c, value in enumerate(values) if value > selection.client_values[c])
        for client in better:
            selection.client_values[client], selection.client_rounds[client] = values[client], evaluation.round_index
        mean = evaluation.summary[f"{selection.metric}/mean"]
        is_best = mean > selection.value
        self.rounds_without_gain = 0 if is_best else self.rounds_without_gain + 1
        if is_best:
            selection.value, selection.round_index = mean, evaluation.round_index
        self.keep_best(is_best, better, tuple(row_of_client[client] for client in better))
        return is_best, better
