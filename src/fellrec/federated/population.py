"""The population: every row's adapter, optimiser state and own tensors, and which client each row belongs to."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fellrec.errors import CheckpointError, StorageError, TrainingError
from fellrec.federated.ranks import Ranks
from fellrec.federated.records import NOTHING, Cohort, Job, Received, ScoreJob, Trained
from fellrec.functional.stacks import LazyStack, as_lazy
from fellrec.state.bank import AdapterBank
from fellrec.state.tensor_store import StoredTensors, TensorSpecs, TensorStore, check_file, open_store
from fellrec.types import Adapter

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobNeeds:
    """What an aggregation rule asks of every job.

    Attributes:
        trains: Whether a parameter is trained in a round: name, round → bool; ``None`` for all.
        start_loss: Whether the loss at the received adapter is measured.
        reset_optimizer: Whether every client forgets its optimiser state at the start of a round.
        is_personal: Whether a parameter never leaves its client; ``None`` if none is.
        ranks: LoRA ranks of the clients, if they differ: a row trains, and is served with, the part of its rank.
    """

    trains: Callable[[str, int], bool] | None = None
    start_loss: bool = False
    reset_optimizer: bool = False
    is_personal: Callable[[str], bool] | None = None
    ranks: Ranks | None = None


class Population:
    """One model a client: row ``c`` belongs to client ``c``.

    Adapters are never changed in place: a row gets another stored version.

    Args:
        initial: Adapter that every row starts from, by parameter.
        num_clients: C.
        needs: What the rule asks of every job.
    """

    def __init__(self, initial: Adapter, num_clients: int, needs: JobNeeds = JobNeeds()) -> None:
        self.num_clients = num_clients
        self.needs = needs
        self.bank = AdapterBank.replicate(initial, self.num_rows)
        self.initial = self.bank.versions[0]
        self.local_steps = [0] * self.num_rows
        self.base: tuple[StoredTensors, ...] = ()
        self._optimizers: dict[int, StoredTensors] = {}
        self._tensors: dict[int, StoredTensors] = {}
        self._anchors: dict[str, StoredTensors] = {}

    @property
    def num_rows(self) -> int:
        """Adapters that are trained."""
        return self.num_clients

    @property
    def num_participants(self) -> int:
        """What a cohort is drawn from."""
        return self.num_clients

    def rows_of(self, participant: int) -> tuple[int, ...]:
        """Rows that train if a participant is in the cohort."""
        return (participant,)

    @property
    def server_rows(self) -> tuple[int, ...]:
        """Rows that the server trains itself, in every round."""
        return ()

    def data_of(self, row: int) -> int | None:
        """Whose data a row is trained on, as ``Job.data_of``."""
        return row

    def served_by(self, client: int) -> int:
        """The row whose adapter ranks for a client's users."""
        return client

    def is_exchanged(self, row: int) -> bool:
        """Whether a row's adapter is aggregated."""
        return True

    def anchors(self, row: int) -> dict[str, StoredTensors]:
        """Other adapters that come with a row's job, by name, beside those of the server."""
        return {}

    def jobs(self, cohort: Cohort) -> list[Job]:
        """What the rows of a cohort, and of the server, start with."""
        jobs = [self.job(row, start) for row, start in zip(cohort.rows, cohort.start_rounds, strict=True)]
        return jobs + [self.job(row, cohort.round_index) for row in self.server_rows]

    def job(self, row: int, round_index: int) -> Job:
        """What a row starts a round with."""
        trains = self.needs.trains
        names = None if trains is None else tuple(name for name in self.bank.kinds if trains(name, round_index))
        reset = self.needs.reset_optimizer
        return Job(
            row=row,
            data_of=self.data_of(row),
            round_index=round_index,
            first_step=self.local_steps[row],
            adapter=self.part(row),
            optimizer=NOTHING if reset else self._optimizers.get(row, NOTHING),
            anchors={**self._anchors, **self.anchors(row)},
            tensors=self._tensors.get(row, NOTHING),
            trains=names,
            needs_start_loss=self.needs.start_loss,
            base=self.base,
        )

    def started(self, job: Job, adapter: Mapping[str, Tensor]) -> Job:
        """A job that starts from another adapter; the row keeps its own until it has trained."""
        return replace(job, adapter=self.store.put(job.row, {name: adapter[name] for name in self.bank.kinds}))

    def score_jobs(self) -> list[ScoreJob]:
        """Every client's users with the adapter that serves them now; one job for each row."""
        return self.score_jobs_of([self.part(self.served_by(c)) for c in range(self.num_clients)], self.base)

    def part(self, row: int) -> StoredTensors:
        """What a row trains and is served with: its adapter, or the part of its rank."""
        version, ranks = self.bank.versions[row], self.needs.ranks
        return version if ranks is None else ranks.part(row, version)

    def model(self) -> Adapter:
        """The server's model, of all ranks and without what is personal; empty where rows have models of their own."""
        return {}

    def score_jobs_of(self, adapters: Sequence[StoredTensors], base: tuple[StoredTensors, ...]) -> list[ScoreJob]:
        """The same with other adapters, one for each client."""
        clients_of: dict[int, list[int]] = {}
        for client in range(self.num_clients):
            clients_of.setdefault(self.served_by(client), []).append(client)
        return [ScoreJob(row, adapters[clients[0]], tuple(clients), base) for row, clients in clients_of.items()]

    def keep(self, trained: Trained) -> Trained:
        """Store what a client returned; where the population is on disk, this is all that a resume in the round needs.

        The adapter's file names the files that its training started from, and holds the update, see ``recover``.

        Raises:
            StorageError: If a file cannot be written.
        """
        row, store = trained.row, self.store
        if store.folder is None:
            self.bank.versions[row] = trained.adapter
            return self._take(trained)
        optimizer = store.put(row, trained.optimizer.tensors(), self._name("optimizer", trained.job))
        tensors = trained.tensors
        if tensors.tensors():
            tensors = store.put(row, tensors.tensors(), self._name("tensors", trained.job))
        about = {
            "update": json.dumps(trained.scalars),
            "made_from": self._made_from(trained.job),
            "optimizer": optimizer.checksum,
            "tensors": tensors.checksum,
        }
        self.bank.store(row, trained.adapter.tensors(), self._name("trained", trained.job), about)
        return self._take(replace(trained, adapter=self.bank.versions[row], optimizer=optimizer, tensors=tensors))

    def recover(self, job: Job) -> Trained | None:
        """What a run that was stopped in the middle of this round had finished of a job, if anything.

        Returns:
            The result, stored as if it had just come back; ``None`` if the client has to train: there is nothing, it
            was trained from another adapter, or it is damaged.
        """
        row, store = job.row, self.store
        if store.folder is None or not (path := store.path_of(row, self._name("trained", job))).is_file():
            return None
        optimizer = store.path_of(row, self._name("optimizer", job))
        tensors = store.path_of(row, self._name("tensors", job))
        try:
            about, other = check_file(path), check_file(optimizer)
            has_tensors = bool(about.get("tensors"))
            third = check_file(tensors)["checksum"] if has_tensors else ""
        except CheckpointError as error:
            _log.warning("%s; client %d trains again", error, row)
            return None
        if (about.get("made_from"), about.get("optimizer"), about.get("tensors")) != (
            self._made_from(job),
            other["checksum"],
            third,
        ):
            return None
        self.bank.versions[row] = StoredTensors(path=path, checksum=about["checksum"])
        return self._take(
            Trained(
                job=job,
                adapter=self.bank.versions[row],
                optimizer=StoredTensors(path=optimizer, checksum=other["checksum"]),
                tensors=StoredTensors(path=tensors, checksum=third) if has_tensors else NOTHING,
                **json.loads(about["update"]),
            )
        )

    def receive(self, received: Received) -> None:
        """Let rows have what came back from an aggregation; parameters and rows that are absent stay as they are."""
        stack = as_lazy(received.adapters)
        if stack:
            _check_part(stack, self.bank.kinds)
            self.receive_adapters(received.rows, stack)
        if received.tensors:
            self._receive_tensors(received)
        if received.base:
            self.base = (*self.base, self.store.put(0, received.base))
        if received.resets:
            self._forget(set(received.resets))
        for row, rank in received.ranks.items():
            self._change_rank(row, rank)
        for name, anchor in received.anchors.items():
            self._anchors[name] = self.store.put(0, anchor)

    def receive_adapters(self, rows: Sequence[int], stack: LazyStack) -> None:
        """Let some rows have other adapters; ``stack`` may have only some of the parameters."""
        if set(stack) != set(self.bank.kinds):
            stack = Overlaid(self.bank.stack(rows), stack)
        self.bank.replace(rows, stack)

    @property
    def store(self) -> TensorStore:
        """Where new versions go."""
        return self.bank.tensor_store

    def persist(self, folder: Path, cohort_size: int | None = None, num_rounds: int = 1) -> None:
        """Let every new version be a file in ``folder`` rather than stay in memory.

        Raises:
            StorageError: If the folder cannot be written, or the adapters will not fit on the disk.
        """
        if not folder.exists():
            self._check_space(folder, cohort_size or self.num_rows, num_rounds)
        self.bank.tensor_store = open_store(folder, self.store.number)

    def state_dict(self) -> dict[str, Any]:
        """See ``Persisted``."""
        return {
            "adapters": self.bank.versions,
            "optimizers": {str(row): stored for row, stored in self._optimizers.items()},
            "tensors": {str(row): stored for row, stored in self._tensors.items()},
            "local_steps": self.local_steps,
            "base": list(self.base),
            "anchors": dict(self._anchors),
            "number": self.store.number,
            "ranks": [] if self.needs.ranks is None else list(self.needs.ranks.of_client),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Persisted``.

        Raises:
            TrainingError: If the checkpoint has another number of rows.
            BackboneError: If an adapter has other names or shapes.
            CheckpointError: If one has values that are not finite.
        """
        if len(state["adapters"]) != self.num_rows:
            raise TrainingError(f"the checkpoint has {len(state['adapters'])} clients, this run has {self.num_rows}")
        self.bank.check(state["adapters"])
        self.bank.versions = list(state["adapters"])
        self._optimizers = {int(row): stored for row, stored in state["optimizers"].items()}
        self._tensors = {int(row): stored for row, stored in state["tensors"].items()}
        self.local_steps = list(state["local_steps"])
        self.base = tuple(state["base"])
        self._anchors = dict(state.get("anchors", {}))
        self.store.number = state["number"]
        if self.needs.ranks is not None:
            self.needs.ranks.of_client = list(state.get("ranks", self.needs.ranks.of_client))

    def optimizer_of(self, row: int) -> Adapter:
        """A row's optimiser state by ``parameter|key``; empty if it has not trained."""
        return self._optimizers.get(row, NOTHING).tensors()

    def tensors_of(self, row: int) -> Adapter:
        """A row's own tensors by ``name|parameter``."""
        return self._tensors.get(row, NOTHING).tensors()

    def _take(self, trained: Trained) -> Trained:
        self._optimizers[trained.row] = trained.optimizer
        if trained.tensors.tensors():
            self._tensors[trained.row] = trained.tensors
        self.local_steps[trained.row] += trained.num_steps
        return trained

    def _forget(self, names: set[str]) -> None:
        """Drop the optimiser state of some parameters in every row, absent ones too."""
        for row, stored in list(self._optimizers.items()):
            kept = {key: t for key, t in stored.tensors().items() if key.partition("|")[0] not in names}
            if kept:
                self._optimizers[row] = self.store.put(row, kept)
            else:
                del self._optimizers[row]  # a checkpoint must not write the version that all runs share

    def _change_rank(self, row: int, rank: int) -> None:
        """Give a row another rank; moments beyond it would move what must stay 0, so they are dropped."""
        ranks = self.needs.ranks
        if ranks is None:
            raise TrainingError("the aggregation returned ranks: set changes_ranks, and use adapter=lora")
        ranks.change(row, rank)
        cut = {
            key: ranks.cut(row, key.partition("|")[0], t) if t.ndim == 2 else t
            for key, t in self.optimizer_of(row).items()
        }
        if cut:
            self._optimizers[row] = self.store.put(row, cut)

    def _receive_tensors(self, received: Received) -> None:
        stacks = {name: dict(as_lazy(stack)) for name, stack in received.tensors.items()}
        for position, row in enumerate(received.rows):
            own = dict(self.tensors_of(row))
            for name, stack in stacks.items():
                own |= {f"{name}|{key}": stack[key][position] for key in stack}
            self._tensors[row] = self.store.put(row, own)

    def _name(self, what: str, job: Job) -> str:
        return f"{what}-{job.round_index:05d}"

    def _made_from(self, job: Job) -> str:
        """The files that a job's training starts from, by their contents; of the adapter that of all ranks.

        Called before the row has what the job made.
        """
        # Another one than the row's if the rule chose what to start from; the part of a rank follows from the version.
        chosen = (job.adapter,) if self.needs.ranks is None else ()
        found = (
            self.bank.versions[job.row],
            *chosen,
            self._optimizers.get(job.row),
            self._tensors.get(job.row),
            *job.anchors.values(),
        )
        return " ".join(stored.checksum for stored in (*found, *self.base) if stored)

    def _check_space(self, folder: Path, cohort_size: int, num_rounds: int) -> None:
        """Refuse a run whose adapters (now and best) and AdamW moments (two) will not fit on the disk."""
        num_rows = min(self.num_rows, cohort_size * num_rounds)
        num_bytes = self.bank.adapter_bytes
        existing = next(parent for parent in folder.absolute().parents if parent.exists())
        needed, free = 4 * num_rows * num_bytes, shutil.disk_usage(existing).free
        if needed > free:
            raise StorageError(
                f"{num_rows} clients with an adapter of {num_bytes / 1e6:.1f} MB each need about {needed / 1e9:.2f} GB "
                f"in {existing}, where {free / 1e9:.2f} GB are free; use adapter=lora, fewer clients or another run_dir"
            )


def _check_part(stack: LazyStack, kinds: TensorSpecs) -> None:
    """Refuse parameters of an aggregation that the adapter does not have, or with another shape."""
    for name, shape in stack.shapes.items():
        if name not in kinds or shape != kinds[name][1]:
            expected = "no such parameter" if name not in kinds else f"shape {list(kinds[name][1])}"
            raise TrainingError(f"the aggregation returned {name} {list(shape)}, but the adapter has {expected}")


class Overlaid(LazyStack):
    """Rows of which some parameters are replaced.

    Args:
        below: All parameters.
        above: Those that are replaced.
    """

    def __init__(self, below: LazyStack, above: LazyStack) -> None:
        super().__init__(below.shapes, below.num_rows)
        self._below = below
        self._above = above

    def block(self, name: str, columns: slice) -> Tensor:
        """See ``LazyStack``."""
        source = self._above if name in self._above.shapes else self._below
        return source.block(name, columns)
