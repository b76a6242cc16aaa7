"""How a round is carried out: by one model in this process, or through the executed cut."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from safetensors.torch import load_file
from torch import Tensor

from fellrec.cut.link import ServerLink
from fellrec.cut.messages import (
    Aggregate,
    Done,
    Download,
    Fetch,
    KeepBest,
    LoadState,
    Mixed,
    Report,
    SaveAdapters,
    SaveState,
    Upload,
)
from fellrec.cut.pipeline import Job, Outcome, PipelinedTrainer
from fellrec.cut.server import ADAPTERS as SERVER_ADAPTERS
from fellrec.cut.server import CHECKPOINTS as SERVER_CHECKPOINTS
from fellrec.distributed.memory import peak_bytes
from fellrec.errors import SplitError, StorageError, TrainingError
from fellrec.federated.checkpoint import CLIENTS, load_state, rounds_on_disk, save_state
from fellrec.federated.ledger import Ledger
from fellrec.federated.slot import load_optimizer, read_optimizer
from fellrec.types import Aggregated, ClientUpdate, Updates

if TYPE_CHECKING:
    from fellrec.federated.loop import FederatedLoop

_log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in the run's directory."""


class Execution(Protocol):
    """What the loop leaves to whoever knows where the parts of the model run."""

    ledger: Ledger

    def start(self, loop: FederatedLoop) -> None:
        """Called once before the first round."""

    def train(self, loop: FederatedLoop, clients: Sequence[int], round_index: int) -> Outcome:
        """Train the cohort's adapters in the bank."""

    def aggregate(self, loop: FederatedLoop, updates: Updates, round_index: int) -> Aggregated:
        """The cohort's next adapters, which are in the bank then.

        Args:
            loop: The loop.
            updates: The adapters of those of its clients that this process holds, and the part that it holds.
            round_index: From 0.
        """

    def keep_on_disk(self, loop: FederatedLoop, run_dir: Path) -> None:
        """Called once before the first round of a run that writes checkpoints: what can be in files should be."""

    def score(self, loop: FederatedLoop, stage: str, round_index: int, bank: str, rows: Sequence[int]) -> None:
        """Add the metrics of the users whom these rows of a bank serve to ``loop.module.metrics``."""

    def keep_best(self, population: bool, clients: tuple[int, ...], rows: tuple[int, ...]) -> None:
        """What validation selected, for whoever holds adapters elsewhere."""

    def save(self, loop: FederatedLoop, run_dir: Path) -> None:
        """Write a checkpoint."""

    def load(self, loop: FederatedLoop, run_dir: Path) -> None:
        """Read the newest checkpoint."""

    def adapters_elsewhere(self, run_dir: Path, bank: str) -> dict[str, Tensor]:
        """The parts of a bank's adapters that other processes or the server hold, name → ``[C, *shape]``."""

    def is_lost(self, client: int) -> bool:
        """Whether nobody holds the client's adapter any more."""

    def start_round(self) -> None:
        """Called before a round is trained: what is measured from here on is the round's."""

    def costs(self, seconds: float) -> dict[str, float]:
        """Figures of the round that took so long, for MLflow."""

    def stop(self) -> None:
        """The run is over; other processes may leave."""


class WholeExecution:
    """Everything in one model: the cut is not executed. What would travel between client and server is booked."""

    def __init__(self) -> None:
        self.ledger = Ledger()

    def start(self, loop: FederatedLoop) -> None:
        """Nothing to do."""

    def train(self, loop: FederatedLoop, clients: Sequence[int], round_index: int) -> Outcome:
        """One client after the other, each with its adapter in the backbone.

        Clients that a run finished before it was stopped in this round are not trained, or reported, again.
        """
        outcome = Outcome()
        for client in clients:
            if not self.recover(loop, client, outcome):
                self.train_one(loop, client, round_index, outcome)
        return outcome

    def recover(self, loop: FederatedLoop, client: int, outcome: Outcome) -> bool:
        """Whether the run had finished a client of this round before it was stopped; its update is added then."""
        recovered = loop.state.recover(client)
        if recovered is not None:
            outcome.updates.append(recovered)
        return recovered is not None

    def train_one(self, loop: FederatedLoop, client: int, round_index: int, outcome: Outcome) -> None:
        """Train one client here, and note in ``outcome`` what became of it."""
        loop.call("on_client_start", client)
        try:
            update = self._train_client(loop, client, round_index)
        except SplitError:
            raise
        except TrainingError as error:
            outcome.failures[client] = note_failure(error)
            return
        outcome.updates.append(update)
        loop.call("on_client_end", update)

    def on_step(self, loop: FederatedLoop, loss: float) -> None:
        """Called after every local step here."""
        loop.on_step(loss)

    def aggregate(self, loop: FederatedLoop, updates: Updates, round_index: int) -> Aggregated:
        """By the rule, here."""
        updates.check_finite(round_index)
        if loop.aggregation.exchanges_adapters:
            self._book(loop, updates, round_index)
        aggregated = loop.aggregation.aggregate(updates, round_index)
        loop.state.bank.replace(updates.clients, aggregated.adapters)
        return replace(aggregated, adapters=loop.state.bank.stack(updates.clients))

    def keep_on_disk(self, loop: FederatedLoop, run_dir: Path) -> None:
        """Every adapter and optimiser state is a file from now on, so that few are in memory at the same time."""
        folder = run_dir / CHECKPOINTS / CLIENTS
        if not folder.exists():
            _check_space(loop, run_dir)
        loop.state.keep_on_disk(folder)

    def score(self, loop: FederatedLoop, stage: str, round_index: int, bank: str, rows: Sequence[int]) -> None:
        """One adapter after the other in the backbone; clients that have the same one come together."""
        versions, before = loop.state.bank_named(bank).versions, None
        first = {id(versions[row]): row for row in reversed(rows)}
        for row in sorted(rows, key=lambda row: (first[id(versions[row])], row)):
            is_new, before = versions[row] is not before, versions[row]
            if is_new:
                loop.state.bank_named(bank).copy_to(loop.module.trainable, row)
            loop.score_row(stage, row, bank, is_new=is_new)

    def keep_best(self, population: bool, clients: tuple[int, ...], rows: tuple[int, ...]) -> None:
        """Nothing is elsewhere."""

    def save(self, loop: FederatedLoop, run_dir: Path) -> None:
        """One manifest; the clients' files are there already."""
        save_state(run_dir / CHECKPOINTS, loop.state, keep=loop.settings.checkpoints_kept)

    def load(self, loop: FederatedLoop, run_dir: Path) -> None:
        """The newest that is whole."""
        load_state(run_dir / CHECKPOINTS, loop.state)

    def adapters_elsewhere(self, run_dir: Path, bank: str) -> dict[str, Tensor]:
        """Nothing is elsewhere."""
        return {}

    def is_lost(self, client: int) -> bool:
        """All are here."""
        return False

    def start_round(self) -> None:
        """Nothing to do."""

    def costs(self, seconds: float) -> dict[str, float]:
        """Nothing beside the ledger."""
        return {}

    def stop(self) -> None:
        """There are no other processes."""

    def _train_client(self, loop: FederatedLoop, client: int, round_index: int) -> ClientUpdate:
        state, parameters = loop.state, loop.module.trainable
        state.bank.copy_to(parameters, client)
        optimizer_state = state.take_optimizer(client, loop.trainer.settings.reset_optimizer)
        load_optimizer(loop.optimizer, parameters, optimizer_state)
        first_step = state.local_steps[client]
        update = loop.trainer.train(
            client, loop.data_of(client), round_index, first_step, lambda loss: self.on_step(loop, loss)
        )
        state.finish(update, parameters, read_optimizer(loop.optimizer, parameters))
        return update

    def _book(self, loop: FederatedLoop, updates: Updates, round_index: int) -> None:
        num_bytes = loop.state.bank.adapter_bytes
        for client in updates.clients:
            for direction in ("up", "down"):
                self.ledger.add(client, round_index, "train", direction, "adapter", num_bytes)
            self.ledger.add(client, round_index, "train", "up", "scalar", 16)


def note_failure(error: TrainingError) -> str:
    """The reason for the user; where it happened is logged for ``--debug``."""
    _log.debug("a client's training failed", exc_info=error)
    return str(error)


def _check_space(loop: FederatedLoop, run_dir: Path) -> None:
    """Refuse a run whose adapters (now and best) and AdamW moments (two) will not fit on the disk."""
    bank, settings = loop.state.bank, loop.settings
    num_clients = min(len(bank), len(loop.cohort(0)) * settings.num_rounds)
    num_bytes = bank.adapter_bytes
    needed, free = 4 * num_clients * num_bytes, shutil.disk_usage(run_dir).free
    if needed > free:
        raise StorageError(
            f"{num_clients} clients with an adapter of {num_bytes / 1e6:.1f} MB each need about {needed / 1e9:.2f} GB "
            f"in {run_dir}, where {free / 1e9:.2f} GB are free; use adapter=lora, fewer clients or another run_dir"
        )


class SplitExecution:
    """The cut, executed: head and tail here, the body behind a link.

    Args:
        link: To the server.
        trainer: The client's half of local training.
    """

    def __init__(self, link: ServerLink, trainer: PipelinedTrainer) -> None:
        self.link = link
        self.trainer = trainer
        self.ledger = link.ledger
        self._before: dict[str, float] = {}

    def start(self, loop: FederatedLoop) -> None:
        """Let the server know the head and tail adapter that all clients start with, if the rule mixes."""
        if loop.aggregation.exchanges_adapters and loop.state.round_index == 0:
            self.link.send(Upload(0, -1, "train", loop.state.bank.row(0)))

    def train(self, loop: FederatedLoop, clients: Sequence[int], round_index: int) -> Outcome:
        """Several clients under way at the same time."""
        jobs = [Job(client, loop.data_of(client)) for client in clients]
        return self.trainer.train(
            jobs,
            round_index,
            loop.state,
            on_start=lambda client: loop.call("on_client_start", client),
            on_step=loop.on_step,
            on_end=lambda update: loop.call("on_client_end", update),
        )

    def aggregate(self, loop: FederatedLoop, updates: Updates, round_index: int) -> Aggregated:
        """On the server, after head and tail adapters went up; they come down mixed.

        Rules that do not mix see the clients' share only, and nothing goes up.
        """
        if not loop.aggregation.exchanges_adapters:
            updates.check_finite(round_index)
            return loop.aggregation.aggregate(updates, round_index)
        self.upload(loop, updates.clients, round_index)
        mixed = self.mix(updates.clients, round_index)
        self.download(loop, updates.clients, round_index)
        return Aggregated(loop.state.bank.stack(updates.clients), mixed.matrices, mixed.per_client)

    def upload(self, loop: FederatedLoop, clients: Sequence[int], round_index: int) -> None:
        """Send these clients' head and tail adapters up."""
        for client in clients:
            adapter = {name: tensor.clone() for name, tensor in loop.state.bank.row(client).items()}
            self.link.send(Upload(client, round_index, "train", adapter))

    def mix(self, clients: tuple[int, ...], round_index: int) -> Mixed:
        """Let the server mix the adapters of these clients."""
        mixed = self.link.request(Aggregate(round_index, clients))
        if not isinstance(mixed, Mixed):
            raise SplitError(f"the server answered the aggregation of round {round_index} with {type(mixed).__name__}")
        return mixed

    def download(self, loop: FederatedLoop, clients: Sequence[int], round_index: int) -> None:
        """Put these clients' mixed head and tail adapters into the bank."""
        for client in clients:
            answer = self.link.request(Fetch(client, round_index, "train"))
            if not isinstance(answer, Download):
                raise SplitError(f"the server answered client {client}'s fetch with {type(answer).__name__}")
            loop.state.bank.store(client, answer.adapter)

    def keep_on_disk(self, loop: FederatedLoop, run_dir: Path) -> None:
        """Nothing: each side has its share in memory and writes it between rounds."""

    def score(self, loop: FederatedLoop, stage: str, round_index: int, bank: str, rows: Sequence[int]) -> None:
        """One adapter after the other; the server uses its own share of the same."""
        for row in rows:
            loop.state.bank_named(bank).copy_to(loop.module.trainable, row)
            with self.link.on_behalf_of(row, round_index, stage, bank):
                loop.score_row(stage, row, bank)

    def keep_best(self, population: bool, clients: tuple[int, ...], rows: tuple[int, ...]) -> None:
        """Tell the server."""
        self.link.send(KeepBest(population, clients, rows))

    def save(self, loop: FederatedLoop, run_dir: Path) -> None:
        """The server's share first: a resume takes the newest round that both have."""
        self.link.request(SaveState(str(run_dir), loop.state.round_index))
        save_state(run_dir / CHECKPOINTS, loop.state, keep=loop.settings.checkpoints_kept)

    def load(self, loop: FederatedLoop, run_dir: Path) -> None:
        """The newest round that both shares have."""
        self.load_round(loop, run_dir, self.newest_round(run_dir, ()))

    def newest_round(self, run_dir: Path, others: Sequence[set[int]]) -> int:
        """The newest round that this process, the server and all others have written."""
        own, servers = rounds_on_disk(run_dir / CHECKPOINTS), rounds_on_disk(run_dir / SERVER_CHECKPOINTS)
        common = set(own).intersection(servers, *others)
        if not common:
            raise TrainingError(f"nothing to resume: no checkpoint of both clients and server in {run_dir}")
        return max(common)

    def load_round(self, loop: FederatedLoop, run_dir: Path, round_index: int) -> None:
        """One round's shares of client and server."""
        load_state(run_dir / CHECKPOINTS, loop.state, round_index)
        self.link.request(LoadState(str(run_dir), round_index))

    def adapters_elsewhere(self, run_dir: Path, bank: str) -> dict[str, Tensor]:
        """The server hands its rows over by a file in the run's directory."""
        folder = run_dir / "adapters"
        self.link.request(SaveAdapters(str(folder), bank))
        found = load_file(folder / SERVER_ADAPTERS)
        (folder / SERVER_ADAPTERS).unlink()
        return found

    def is_lost(self, client: int) -> bool:
        """The server has its share of all, and this process the rest."""
        return False

    def start_round(self) -> None:
        """Remember the readings: an evaluation's work is not the round's."""
        self._before = self._readings()

    def costs(self, seconds: float) -> dict[str, float]:
        """How busy both sides were, their memory, and what the cache of a frozen head saved."""
        now = self._readings()
        took = {name: value - self._before.get(name, 0.0) for name, value in now.items()}
        busy, waited = took["busy_seconds"], took["waited_seconds"]
        figures = {
            "cost/server/busy_seconds": busy,
            "cost/server/busy_rate": _share(busy, seconds),
            "cost/server/peak_bytes": now["peak_bytes"],
            "cost/client/waited_seconds": waited,
            "cost/client/busy_seconds": max(0.0, seconds - waited),
            "cost/client/busy_rate": _share(seconds - waited, seconds),
            "cost/client/peak_bytes": float(peak_bytes()),
        }
        cache = self.trainer.head_cache
        if cache is not None:
            names = ("rows", "taken_rows", "compute_seconds", "take_seconds")
            figures |= {f"cost/head_cache/{name}": took[name] for name in names}
            figures["cost/head_cache/saved_rate"] = _share(took["taken_rows"], took["rows"])
            figures["cost/head_cache/used_bytes"] = float(cache.used_bytes)
        return figures

    def _readings(self) -> dict[str, float]:
        """Figures that only grow."""
        waited = self.link.waited_seconds  # before the server is asked: asking is not the round's work
        done, cache = self.link.request(Report()), self.trainer.head_cache
        assert isinstance(done, Done)
        return {
            "busy_seconds": done.busy_seconds,
            "peak_bytes": float(done.peak_bytes),
            "waited_seconds": waited,
            **(cache.figures if cache is not None else {}),
        }

    def stop(self) -> None:
        """There are no other processes."""


def _share(part: float, whole: float) -> float:
    return min(1.0, max(0.0, part / whole)) if whole > 0 else 0.0
