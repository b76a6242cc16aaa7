"""The cost of a run: storage of client and server, traffic, and computing time; for tables, JSON and MLflow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fellrec.federated.ledger import DIRECTIONS, KINDS
from fellrec.federated.records import RoundRecord


@dataclass(frozen=True)
class Storage:
    """Bytes of the parameters in memory, those of LoRA included.

    Attributes:
        client_bytes: Embedding, head, tail, final norm, LM head.
        server_bytes: Body.
    """

    client_bytes: int
    server_bytes: int

    @property
    def client_fraction(self) -> float:
        """Fraction of all parameters that the client stores, in [0, 1]."""
        return self.client_bytes / max(1, self.client_bytes + self.server_bytes)


@dataclass(frozen=True)
class Rounds:
    """Sums of measurements over several rounds, without evaluation.

    Attributes:
        round_seconds: Wall seconds of training and aggregation of each measured round: all rounds of a run
            but those in which it was interrupted.
        cpu_seconds: Processor time of this process in each round, which other work on the machine hardly affects.
        sums: Values of ``RoundRecord.costs`` that are summed, without ``cost/``, such as ``server/busy_seconds``.
        peaks: Values of which the maximum is kept, such as ``client/peak_bytes``.
    """

    round_seconds: tuple[float, ...] = ()
    cpu_seconds: tuple[float, ...] = ()
    sums: Mapping[str, float] = field(default_factory=dict)
    peaks: Mapping[str, float] = field(default_factory=dict)

    def plus(self, record: RoundRecord, cpu_seconds: float) -> Rounds:
        """These rounds and one more, with its processor time."""
        sums, peaks = dict(self.sums), dict(self.peaks)
        for key, value in record.costs.items():
            name = key.removeprefix("cost/")
            if name.endswith("_seconds"):
                sums[name] = sums.get(name, 0.0) + value
            elif name.endswith("peak_bytes"):
                peaks[name] = max(value, peaks.get(name, 0.0))
        return Rounds((*self.round_seconds, record.seconds), (*self.cpu_seconds, cpu_seconds), sums, peaks)

    @property
    def num_rounds(self) -> int:
        """Number of measured rounds."""
        return len(self.round_seconds)

    @property
    def seconds(self) -> float:
        """Wall seconds of all measured rounds."""
        return sum(self.round_seconds)

    @property
    def cpu_seconds_per_round(self) -> float | None:
        """Mean processor time of a round; ``None`` if none was measured."""
        return sum(self.cpu_seconds) / len(self.cpu_seconds) if self.cpu_seconds else None

    def busy_rate(self, role: str) -> float | None:
        """Fraction of the rounds' time in which ``"server"`` or ``"client"`` computed; ``None`` without a cut."""
        busy = self.sums.get(f"{role}/busy_seconds")
        return None if busy is None or self.seconds <= 0 else min(1.0, busy / self.seconds)


@dataclass(frozen=True)
class RunCost:
    """The cost of one run.

    Attributes:
        storage: Of both sides.
        rounds: Measurements.
        train_bytes: Kind → direction → bytes of all rounds of training.
        num_rounds: Rounds in ``train_bytes``.
        evaluation_bytes: Of all validations and the test, both ways.
        transport: ``split.transport``; with ``none`` the cut was not executed, and no hidden state crossed.
    """

    storage: Storage
    rounds: Rounds
    train_bytes: Mapping[str, Mapping[str, int]]
    num_rounds: int
    evaluation_bytes: int
    transport: str

    @classmethod
    def collect(cls, storage: Storage, rounds: Rounds, ledger_rows: Iterable[Sequence[Any]], transport: str) -> RunCost:
        """From the ledger's rows, see ``Ledger.rows``."""
        booked: dict[str, dict[str, int]] = {}
        seen, evaluation_bytes = set(), 0
        for _, round_index, phase, direction, kind, _, num_bytes in ledger_rows:
            if phase != "train":
                evaluation_bytes += num_bytes
            else:
                seen.add(round_index)
                by_direction = booked.setdefault(kind, dict.fromkeys(DIRECTIONS, 0))
                by_direction[direction] += num_bytes
        kinds = [kind for kind in KINDS if kind in booked]
        train_bytes = {kind: booked[kind] for kind in kinds}
        return cls(storage, rounds, train_bytes, max(len(seen), rounds.num_rounds), evaluation_bytes, transport)

    @classmethod
    def of_dict(cls, plain: Mapping[str, Any]) -> RunCost:
        """From `to_dict`.

        Raises:
            LookupError: If a value is absent.
        """
        measured = plain["measured"]
        seconds = tuple(measured["round_seconds"]), tuple(measured["cpu_seconds"])
        return cls(
            Storage(plain["client_weight_bytes"], plain["server_weight_bytes"]),
            Rounds(*seconds, measured["sums"], measured["peaks"]),
            plain["train_bytes"],
            plain["num_rounds"],
            plain["evaluation_bytes"],
            plain["transport"],
        )

    def round_bytes(self, direction: str | None = None, kind: str | None = None) -> float:
        """Mean bytes of a round of training, all clients together."""
        total = sum(
            num_bytes
            for its_kind, by_direction in self.train_bytes.items()
            for its_direction, num_bytes in by_direction.items()
            if kind in (None, its_kind) and direction in (None, its_direction)
        )
        return total / max(1, self.num_rounds)

    def metrics(self) -> dict[str, float]:
        """Flat MLflow-safe names, such as ``cost/client/weight_bytes`` and ``cost/round_bytes``."""
        found = {
            "cost/client/weight_bytes": float(self.storage.client_bytes),
            "cost/server/weight_bytes": float(self.storage.server_bytes),
            "cost/client/weight_share": self.storage.client_fraction,
            "cost/round_bytes": self.round_bytes(),
            "cost/evaluation_bytes": float(self.evaluation_bytes),
        }
        for role in ("client", "server"):
            rate = self.rounds.busy_rate(role)
            if rate is not None:
                found[f"cost/run/{role}_busy_rate"] = rate
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: bytes, seconds, and fractions in [0, 1]."""
        return {
            "client_weight_bytes": self.storage.client_bytes,
            "server_weight_bytes": self.storage.server_bytes,
            "client_weight_share": self.storage.client_fraction,
            "transport": self.transport,
            "num_rounds": self.num_rounds,
            "round_bytes": self.round_bytes(),
            "round_up_bytes": self.round_bytes("up"),
            "round_down_bytes": self.round_bytes("down"),
            "train_bytes": {kind: dict(by_direction) for kind, by_direction in self.train_bytes.items()},
            "evaluation_bytes": self.evaluation_bytes,
            "measured": {
                "round_seconds": list(self.rounds.round_seconds),
                "cpu_seconds": list(self.rounds.cpu_seconds),
                "server_busy_rate": self.rounds.busy_rate("server"),
                "client_busy_rate": self.rounds.busy_rate("client"),
                "sums": dict(self.rounds.sums),
                "peaks": dict(self.rounds.peaks),
            },
        }
