"""What is asked of a client in a round, and what comes back; see ``fellrec.federated.records``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fellrec.state.tensor_store import StoredTensors
from fellrec.types import PUBLIC

NOTHING = StoredTensors({})
"""No tensors: the optimiser state before the first step, or a client without tensors of its own."""


@dataclass(frozen=True)
class Cohort:
    """Who trains in a round, and when on the simulated clock.

    Attributes:
        round_index: From 0.
        rows: Rows of the population that train, ascending.
        start_rounds: For each, the round whose model it received: this one, or an earlier one if the rule is
            asynchronous.
        num_needed: Clients of whom a quorum must finish.
        begun: Simulated seconds from the start of the run to that of the round.
        seconds: Simulated seconds from the start of the run to the end of the round.
        dropped: Clients that were drawn and dropped out.
        late: Clients that were drawn, and would have finished after the cohort was complete.
        oldest: The oldest round whose model a client may still be training from when this round is over.
        measured: Clients that measured their loss, to be chosen by it.
    """

    round_index: int
    rows: tuple[int, ...]
    start_rounds: tuple[int, ...]
    num_needed: int
    begun: float = 0.0
    seconds: float = 0.0
    dropped: tuple[int, ...] = ()
    late: tuple[int, ...] = ()
    oldest: int = 0
    measured: tuple[int, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        """Figures worth logging, by MLflow-safe names."""
        staleness = [self.round_index - start for start in self.start_rounds]
        return {
            "participation/simulated_seconds": self.seconds,
            "participation/num_models": float(len(self.rows)),
            "participation/num_dropped": float(len(self.dropped)),
            "participation/num_late": float(len(self.late)),
            "participation/staleness_mean": sum(staleness) / max(1, len(staleness)),
            "participation/staleness_max": float(max(staleness, default=0)),
        }


@dataclass(frozen=True)
class Job:
    """The local training of one row of the population in one round.

    Attributes:
        row: Row of the population.
        data_of: Client whose data are used; ``None`` for the pooled data of all clients, `PUBLIC` for those of the
            public users, on which the server trains.
        round_index: From 0.
        first_step: Optimiser steps of this row in earlier rounds.
        adapter: Adapter that training starts from.
        optimizer: Optimiser state, tensors by ``parameter|key``.
        anchors: Other adapters that a local term needs, by name.
        tensors: Tensors of the client by ``name|parameter``, such as control variates.
        trains: Names of the parameters that are trained; ``None`` for all.
        needs_start_loss: Whether the mean training loss at ``adapter`` is measured before the first step.
        base: Changes of the frozen base that must be applied, the oldest first; see ``BaseChange``.
    """

    row: int
    data_of: int | None
    round_index: int
    first_step: int
    adapter: StoredTensors
    optimizer: StoredTensors = NOTHING
    anchors: Mapping[str, StoredTensors] = field(default_factory=dict)
    tensors: StoredTensors = NOTHING
    trains: tuple[str, ...] | None = None
    needs_start_loss: bool = False
    base: tuple[StoredTensors, ...] = ()

    @property
    def client(self) -> int:
        """The client that trains; 0 for the pooled data, `PUBLIC` for the server."""
        return self.data_of or 0

    @property
    def is_at_server(self) -> bool:
        """Whether the server trains, and no client does."""
        return self.data_of == PUBLIC

    @property
    def who(self) -> str:
        """Who trains, for messages."""
        return "the server" if self.is_at_server else f"client {self.client}"


@dataclass(frozen=True)
class Trained:
    """A finished local training.

    Attributes:
        job: What was asked for; its ``round_index`` is the round that training started from.
        adapter: Adapter after training.
        optimizer: Optimiser state after training, as in ``Job``.
        loss: Mean loss over all targets of the local steps, METHOD (2).
        num_samples: Training targets of the client.
        num_steps: Optimiser steps.
        seconds: Wall seconds.
        start_loss: Mean training loss at the received adapter; ``None`` if it was not asked for.
        tensors: Tensors of the client after training, as in ``Job``.
        peak_bytes: Largest memory so far of the process that trained the client.
        traffic: Rows of the ledger with what crossed a cut in this training.
    """

    job: Job
    adapter: StoredTensors
    optimizer: StoredTensors
    loss: float
    num_samples: int
    num_steps: int
    seconds: float
    start_loss: float | None = None
    tensors: StoredTensors = NOTHING
    peak_bytes: int = 0
    traffic: Sequence[Sequence[Any]] = ()

    @property
    def row(self) -> int:
        """Row of the population."""
        return self.job.row

    @property
    def scalars(self) -> dict[str, Any]:
        """Everything that is neither the job nor a tensor, by the names of the constructor."""
        return {name: getattr(self, name) for name in SCALARS}


SCALARS = ("loss", "num_samples", "num_steps", "seconds", "start_loss", "peak_bytes", "traffic")
"""Fields of `Trained` that are neither the job nor a tensor."""


@dataclass(frozen=True)
class Failed:
    """A local training that did not finish: an exception, a loss that is not finite, or a lost process.

    Attributes:
        job: What was asked for.
        reason: One sentence for the user.
    """

    job: Job
    reason: str

    @property
    def row(self) -> int:
        """Row of the population."""
        return self.job.row


@dataclass(frozen=True)
class LossJob:
    """Adapters whose mean loss one client measures before a round, without training.

    Attributes:
        row: Row of the population.
        data_of: As in ``Job``.
        round_index: From 0.
        adapters: What is measured, in this order.
        own: The client's own adapter, which need not be sent if it is one of them.
        base: As in ``Job``.
    """

    row: int
    data_of: int | None
    round_index: int
    adapters: tuple[StoredTensors, ...]
    own: StoredTensors | None = None
    base: tuple[StoredTensors, ...] = ()

    @property
    def sent(self) -> list[StoredTensors]:
        """Adapters that the client does not have."""
        return [adapter for adapter in self.adapters if adapter is not self.own]

    @property
    def client(self) -> int:
        """The client that measures; 0 for the pooled data."""
        return self.data_of or 0

    def training(self, adapter: StoredTensors) -> Job:
        """The job of a training with one of the adapters in which nothing is trained."""
        return Job(self.row, self.data_of, self.round_index, 0, adapter, trains=(), base=self.base)


@dataclass(frozen=True)
class ScoreJob:
    """The users of some clients, to be ranked with one adapter.

    Attributes:
        row: Row of the population that the adapter belongs to.
        adapter: The adapter.
        clients: Clients whose users are ranked.
        base: As in ``Job``.
    """

    row: int
    adapter: StoredTensors
    clients: tuple[int, ...]
    base: tuple[StoredTensors, ...] = ()


def of_jobs(jobs: Sequence[Job]) -> str:
    """Who trains in some jobs, for messages: ``client 3``, or ``client 3, client 0``."""
    return ", ".join(job.who for job in jobs)


def not_finite(name: str, who: str, round_index: int) -> str:
    """The message for a parameter that local training made infinite or undefined."""
    return f"{name} of {who} is not finite after local training in round {round_index}; lower trainer.learning_rate"
