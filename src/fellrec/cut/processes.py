"""A run in several processes: rank 0 is the server, rank 1 leads and has clients, the others have clients only.

The server only answers. The first client process runs the loop and keeps the experiment's books; it tells the other
client processes what to train and score. What they tell it (metrics of single users among it) never passes the server.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fellrec.cut.link import ServerLink
from fellrec.cut.messages import (
    AmongClients,
    ClientMessage,
    Done,
    KeepBest,
    LoadState,
    Message,
    Mixed,
    Refresh,
    SaveAdapters,
    SaveState,
    Score,
    Scored,
    Stop,
    Train,
    Trained,
)
from fellrec.cut.pipeline import Outcome, PipelinedTrainer
from fellrec.cut.server import BodyServer
from fellrec.distributed.channel import PeerGoneError, Wire, role_name
from fellrec.errors import SplitError, TrainingError
from fellrec.federated.checkpoint import load_state, rounds_on_disk, save_state
from fellrec.federated.executor import SplitExecution
from fellrec.types import Aggregated, ClientUpdate, Updates

if TYPE_CHECKING:
    from fellrec.federated.loop import FederatedLoop

SERVER, LEAD = 0, 1
"""Ranks."""


def serve(wire: Wire, server: BodyServer, skips: bool) -> None:
    """Answer the client processes until the run is over.

    Args:
        wire: Of the server's process.
        server: Answers.
        skips: Whether the run goes on without a client process that is gone; the first one cannot be missed.

    Raises:
        SplitError: If a process is gone that cannot be missed, or sends what it must not.
    """
    clients_of: dict[int, set[int]] = {}
    held: list[tuple[int, Message]] = []
    while True:
        try:
            rank, message = wire.receive_any()
        except PeerGoneError as error:
            if error.rank == LEAD or not skips:
                raise
            gone = clients_of.pop(error.rank, set())
            server.forget(gone)
            if any(gone.intersection(server.lacks(waiting)) for _, waiting in held):
                raise  # the aggregation that waits for them was asked for when they seemed to have finished
            continue
        if isinstance(message, Stop):
            wire.send(rank, Done())
            return
        if isinstance(message, AmongClients):
            raise SplitError(f"{role_name(rank)} sent {type(message).__name__}, which is not for the server")
        if isinstance(message, ClientMessage):
            clients_of.setdefault(rank, set()).add(message.client)
            wire.where = f", in round {message.round_index}, client {message.client}"
        if server.lacks(message):
            held.append((rank, message))
            continue
        _answer(wire, server, rank, message)
        for waiting in [item for item in held if not server.lacks(item[1])]:
            held.remove(waiting)
            _answer(wire, server, *waiting)


def _answer(wire: Wire, server: BodyServer, rank: int, message: Message) -> None:
    reply = server.handle(message)
    if reply is not None:
        wire.send(rank, reply)


class LeadExecution(SplitExecution):
    """The executed cut with clients in several processes, as the first client process sees it.

    Args:
        link: To the server.
        trainer: The client's half of local training, for the clients of this process.
        wire: Of this process.
        workers: Ranks of the other client processes.
    """

    def __init__(self, link: ServerLink, trainer: PipelinedTrainer, wire: Wire, workers: Sequence[int]) -> None:
        super().__init__(link, trainer)
        self.wire = wire
        self.workers = list(workers)
        self._ranks = (LEAD, *workers)
        self._lost: list[int] = []

    def rank_of(self, client: int) -> int:
        """The process that a client lives in."""
        return self._ranks[client % len(self._ranks)]

    def is_lost(self, client: int) -> bool:
        """Whether the client's process is gone, and its adapter with it."""
        return self.rank_of(client) in self._lost

    def train(self, loop: FederatedLoop, clients: Sequence[int], round_index: int) -> Outcome:
        """Every process trains its clients at the same time."""
        outcome, busy = Outcome(), []
        for rank, theirs in self._by_rank(clients).items():
            if rank == LEAD:
                continue
            if self._tell(loop, rank, Train(round_index, theirs)):
                busy.append((rank, theirs))
            else:
                outcome.failures |= {client: f"{role_name(rank)} of client {client} is gone" for client in theirs}
        own = super().train(loop, self._by_rank(clients).get(LEAD, ()), round_index)
        outcome.updates += own.updates
        outcome.failures |= own.failures
        for rank, theirs in busy:
            answer = self._hear(loop, rank, Trained)
            if answer is None:
                outcome.failures |= {client: f"{role_name(rank)} of client {client} is gone" for client in theirs}
                continue
            updates = [ClientUpdate(*values) for values in answer.updates]
            for update in updates:
                loop.state.local_steps[update.client] += update.num_steps
                loop.call("on_client_end", update)
            outcome.updates += updates
            outcome.failures |= {int(client): reason for client, reason in answer.failures.items()}
        outcome.updates.sort(key=lambda update: clients.index(update.client))
        return outcome

    def aggregate(self, loop: FederatedLoop, updates: Updates, round_index: int) -> Aggregated:
        """On the server; every process sends up and fetches for its own clients.

        The result's adapters are those of this process's clients that are in the bank here.
        """
        clients = updates.clients
        own = self._by_rank(clients).get(LEAD, ())
        if not loop.aggregation.exchanges_adapters:
            matrix = loop.aggregation.mixing_matrix(updates, round_index)
            return Aggregated(loop.state.bank.stack(clients), {"mixing": matrix})
        self.upload(loop, own, round_index)
        mixed: Mixed = self.mix(clients, round_index)
        self.download(loop, own, round_index)
        for rank, theirs in self._by_rank(clients).items():
            if rank != LEAD:
                self._ask(loop, rank, Refresh(round_index, theirs), Scored)
        return Aggregated(loop.state.bank.stack(clients), mixed.matrices, mixed.per_client)

    def score(self, loop: FederatedLoop, stage: str, round_index: int, bank: str, rows: Sequence[int]) -> None:
        """Every process scores the users of its clients at the same time."""
        busy = [
            rank
            for rank, theirs in self._by_rank(rows).items()
            if rank != LEAD and self._tell(loop, rank, Score(stage, round_index, bank, theirs))
        ]
        super().score(loop, stage, round_index, bank, self._by_rank(rows).get(LEAD, ()))
        for rank in busy:
            answer = self._hear(loop, rank, Scored)
            if answer is not None:
                loop.module.add_users(answer.users)

    def keep_best(self, population: bool, clients: tuple[int, ...], rows: tuple[int, ...]) -> None:
        """Tell everybody."""
        super().keep_best(population, clients, rows)
        for rank in self.workers:
            self.wire.send(rank, KeepBest(population, clients, rows))

    def save(self, loop: FederatedLoop, run_dir: Path) -> None:
        """Every process writes what it holds; the first one last."""
        for rank in list(self.workers):
            self._ask(loop, rank, SaveState(str(run_dir), loop.state.round_index), Done)
        super().save(loop, run_dir)

    def load(self, loop: FederatedLoop, run_dir: Path) -> None:
        """The newest round that all processes have.

        Raises:
            TrainingError: If there is none, or clients lived in other processes then.
        """
        before = len(list(run_dir.glob("checkpoints-rank*"))) + 1
        if before != len(self._ranks):
            raise TrainingError(
                f"{run_dir} was trained by {before} client processes, which hold its clients' adapters, and there are "
                f"{len(self._ranks)} now; start {before + 1} processes"
            )
        rounds = [set(rounds_on_disk(worker_folder(run_dir, rank))) for rank in self.workers]
        newest = self.newest_round(run_dir, rounds)
        super().load_round(loop, run_dir, newest)
        for rank in self.workers:
            self._ask(loop, rank, LoadState(str(run_dir), newest), Done)

    def adapters_elsewhere(self, run_dir: Path, bank: str) -> dict[str, Tensor]:
        """Those of the server, and head and tail of the other processes' clients."""
        found = super().adapters_elsewhere(run_dir, bank)
        own = self._loop_state.bank_named(bank)
        stacks = {name: stack.clone() for name, stack in own.tensors.items()}
        folder = run_dir / "adapters"
        for rank in self.workers:
            self.wire.send(rank, SaveAdapters(str(folder), bank))
            self.wire.receive(rank)
            theirs = load_file(folder / worker_file(rank))
            (folder / worker_file(rank)).unlink()
            rows = [row for row in range(len(own)) if self.rank_of(row) == rank]
            for name, stack in theirs.items():
                stacks[name][rows] = stack[rows]
        return found | stacks

    def start(self, loop: FederatedLoop) -> None:
        """As in one process."""
        self._loop_state = loop.state
        super().start(loop)

    def stop(self) -> None:
        """The run is over."""
        for rank in (*self.workers, SERVER):
            self.wire.send(rank, Stop())
            self.wire.receive(rank)

    def _by_rank(self, clients: Sequence[int]) -> dict[int, tuple[int, ...]]:
        found: dict[int, tuple[int, ...]] = {}
        for client in clients:
            found[self.rank_of(client)] = (*found.get(self.rank_of(client), ()), client)
        return found

    def _tell(self, loop: FederatedLoop, rank: int, message: Message) -> bool:
        """Send to a client process; false if it is gone and the run goes on without it."""
        if rank not in self.workers:
            return False
        try:
            self.wire.send(rank, message)
        except PeerGoneError as error:
            return self._lose(loop, error)
        return True

    def _hear(self, loop: FederatedLoop, rank: int, kind: type[Any]) -> Any:
        """The answer of a client process, its ledger booked; ``None`` if it is gone and the run goes on."""
        try:
            answer = self.wire.receive(rank)
        except PeerGoneError as error:
            self._lose(loop, error)
            return None
        if not isinstance(answer, kind):
            raise SplitError(f"{role_name(rank)} answered with {type(answer).__name__}, expected {kind.__name__}")
        self.ledger.merge(getattr(answer, "ledger", ()))
        return answer

    def _ask(self, loop: FederatedLoop, rank: int, message: Message, kind: type[Any]) -> Any:
        return self._hear(loop, rank, kind) if self._tell(loop, rank, message) else None

    def _lose(self, loop: FederatedLoop, error: PeerGoneError) -> bool:
        if loop.settings.on_failure == "stop":
            raise TrainingError(str(error)) from error
        self.workers.remove(error.rank)
        self._lost.append(error.rank)
        return False


class Worker:
    """A client process that does as the first one says, for its own clients.

    Args:
        loop: With this process's share of everything; it has no callbacks and is not run.
        execution: Through the executed cut.
        wire: Of this process.
    """

    def __init__(self, loop: FederatedLoop, execution: SplitExecution, wire: Wire) -> None:
        self.loop = loop
        self.execution = execution
        self.wire = wire

    def run(self) -> None:
        """Do what is asked until the run is over."""
        while not isinstance(message := self.wire.receive(LEAD), Stop):
            answer = self._do(message)
            if answer is not None:
                self.wire.send(LEAD, answer)
        self.wire.send(LEAD, Done())

    def _do(self, message: Message) -> Message | None:  # noqa: PLR0911
        match message:
            case Train():
                return self._train(message)
            case Refresh():
                self.execution.download(self.loop, message.clients, message.round_index)
                return self._scored()
            case Score():
                self.loop.module.eval()
                self.execution.score(self.loop, message.stage, message.round_index, message.bank, message.rows)
                return self._scored()
            case KeepBest():
                self.loop.state.keep_best(message.population, message.clients, message.rows)
                return None
            case LoadState():
                folder = worker_folder(Path(message.run_dir), self.wire.rank)
                load_state(folder, self.loop.state, message.round_index)
                return Done()
            case SaveState():
                self.loop.state.round_index = message.round_index
                folder = worker_folder(Path(message.run_dir), self.wire.rank)
                save_state(folder, self.loop.state, keep=self.loop.settings.checkpoints_kept)
                return Done()
            case SaveAdapters():
                folder = Path(message.folder)
                folder.mkdir(parents=True, exist_ok=True)
                save_file(dict(self.loop.state.bank_named(message.bank).tensors), folder / worker_file(self.wire.rank))
                return Done()
        raise SplitError(f"rank {self.wire.rank} has no use for {type(message).__name__}")

    def _train(self, message: Train) -> Message:
        outcome = self.execution.train(self.loop, message.clients, message.round_index)
        finished = [update.client for update in outcome.updates]
        if self.loop.aggregation.exchanges_adapters:
            self.execution.upload(self.loop, finished, message.round_index)
        updates = tuple((u.client, u.num_samples, u.num_steps, u.loss, u.seconds) for u in outcome.updates)
        failures = {str(client): reason for client, reason in outcome.failures.items()}
        return Trained(updates, failures, self._ledger())

    def _scored(self) -> Message:
        return Scored(self.loop.module.take_users(), self._ledger())

    def _ledger(self) -> tuple[tuple[Any, ...], ...]:
        return tuple(tuple(row) for row in self.execution.ledger.take())


def worker_folder(run_dir: Path, rank: int) -> Path:
    """Where a client process other than the first writes its checkpoints."""
    return run_dir / f"checkpoints-rank{rank}"


def worker_file(rank: int) -> str:
    """Where it writes its clients' selected adapters."""
    return f"rank{rank}.safetensors"
