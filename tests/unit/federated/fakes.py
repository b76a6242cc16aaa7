"""A federated loop without a language model: clients "train" by adding a number to their adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fellrec.aggregation import AggregationCallback, FedAvg
from fellrec.federated.arrivals import Arrivals
from fellrec.federated.callback import Events, FederatedCallback
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.exchange import Exchange, Transform
from fellrec.federated.ledger import Ledger
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.participation import Clients, Participation
from fellrec.federated.poison import Poison
from fellrec.federated.privacy import PrivateMean
from fellrec.federated.progress import Progress
from fellrec.federated.records import Failed, Job, LossJob, ScoreJob, Trained
from fellrec.federated.samplers import Sampler
from fellrec.federated.selection import Selection
from fellrec.federated.settings import ExchangeSettings, ParticipationSettings, TrainerSettings
from fellrec.metrics import summarise
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import Evaluation

NAMES = ("a", "b")


class FakeExecutor:
    """Adds row + 1 to every trained parameter; a client's metric is the sum of its adapter, capped at ``best``."""

    def __init__(
        self, fails: Callable[[Job], bool] = lambda job: False, best: float = 1e9, has_tensors: bool = False
    ) -> None:
        self.fails, self.best, self.has_tensors, self.scored = fails, best, has_tensors, list[str]()

    def train(self, jobs: Sequence[Job], events: Events) -> Iterator[Trained | Failed]:
        for job in jobs:
            events.client_starts(job)
            yield Failed(job, f"client {job.row} failed") if self.fails(job) else trained(job, self.has_tensors)

    def measure(self, jobs: Sequence[LossJob]) -> list[tuple[float, ...]]:
        """The mean of each adapter, negated."""
        return [tuple(-float(adapter.tensors()["a"].mean()) for adapter in job.adapters) for job in jobs]

    def score(self, jobs: Sequence[ScoreJob], stage: str, round_index: int) -> Evaluation:
        self.scored.append(stage)
        sums = {c: sum(float(t.sum()) for t in job.adapter.tensors().values()) for job in jobs for c in job.clients}
        values = torch.tensor([value if value <= self.best else -value for _, value in sorted(sums.items())])
        return summarise({"ndcg_at_10": values.double()}, torch.arange(len(values)), len(values), stage, round_index)

    def close(self) -> None:
        pass


def trained(job: Job, has_tensors: bool = False) -> Trained:
    """What a client returns: its row + 1 is added to what it trains."""
    adapter = {n: t + (job.row + 1) * (job.trains is None or n in job.trains) for n, t in job.adapter.tensors().items()}
    steps = {"a|step": torch.tensor(float(job.first_step + 1))}
    own = {"seen|a": torch.tensor([float(job.round_index)])} if has_tensors else {}
    stored = StoredTensors(adapter), StoredTensors(steps)
    return Trained(job, *stored, loss=1.0 / (job.row + 1), num_samples=job.row + 1, num_steps=1, seconds=0.0,
                   start_loss=2.0 if job.needs_start_loss else None, tensors=StoredTensors(own))  # fmt: skip


def fake_loop(
    rule: AggregationCallback | None = None,
    executor: FakeExecutor | None = None,
    num_clients: int = 4,
    callbacks: Sequence[FederatedCallback] = (),
    participation: dict[str, Any] | None = None,
    transforms: Sequence[Transform] = (),
    sampler: Sampler | None = None,
    privacy: PrivateMean | None = None,
    poison: Poison | None = None,
    secure: ExchangeSettings | None = None,
    **trainer: Any,
) -> FederatedLoop:
    """A loop over adapters of two parameters."""
    rule = rule or FedAvg()
    settings = TrainerSettings(**{"num_rounds": 3, **trainer})
    initial = {name: torch.zeros(2) for name in NAMES}
    rule.begin(initial)
    population = rule.new_population(initial, num_clients)
    return FederatedLoop(
        population=population,
        participation=participation_of(rule, num_clients, participation or {}, sampler),
        executor=executor or FakeExecutor(),
        exchange=Exchange(
            rule, Ledger(), transforms, num_clients=num_clients, privacy=privacy, poison=poison, secure=secure
        ),
        rule=rule,
        selection=Selection(population, settings.metric, settings.select, settings.patience, settings.frontier_floor),
        progress=Progress(),
        events=Events([rule, *callbacks]),
        settings=settings,
    )


def participation_of(
    rule: AggregationCallback, num_clients: int, how: dict[str, Any], sampler: Sampler | None = None
) -> Participation:
    """Client c has c + 1 training targets and takes one step."""
    settings = ParticipationSettings(**how)
    clients = Clients(settings, 0, range(1, num_clients + 1), [1] * num_clients)
    plain = Participation(settings, 0, clients, sampler)
    buffer_size = rule.buffer_of(plain.num_needed)
    return plain if buffer_size is None else Arrivals(settings, 0, clients, sampler, buffer_size)


def parts(loop: FederatedLoop) -> dict[str, Any]:
    """What a checkpoint of the loop holds."""
    return {
        "progress": loop.progress, "population": loop.population, "participation": loop.participation,
        "selection": loop.selection,
        "rule": loop.rule, "exchange": loop.exchange, "ledger": loop.exchange.ledger,
    }  # fmt: skip


def resumed(loop: FederatedLoop, folder: Path, **how: Any) -> FederatedLoop:
    """Save a loop, and give another one that continues from there."""
    CheckpointFolder(folder).save(parts(loop), loop.progress.round_index)
    other = fake_loop(**how)
    CheckpointFolder(folder).load(parts(other))
    return other


def adapters(loop: FederatedLoop) -> list[dict[str, list[float]]]:
    """Every row's adapter."""
    return [{n: t.tolist() for n, t in stored.tensors().items()} for stored in loop.population.bank.versions]
