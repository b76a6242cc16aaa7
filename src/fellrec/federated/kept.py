"""Metrics of users that were ranked before: with the same adapter they are not ranked again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fellrec.federated.population import Population
from fellrec.federated.records import ScoreJob
from fellrec.metrics.clients import UserMetrics
from fellrec.state.tensor_store import StoredTensors

Base = tuple[StoredTensors, ...]


@dataclass(frozen=True)
class Ranked:
    """What was found with one adapter.

    Attributes:
        clients: Whose users were ranked, those of clients without users included.
        users: The users' metrics, for each of the ranker's choices.
    """

    clients: frozenset[int]
    users: tuple[UserMetrics, ...]

    def of(self, clients: Iterable[int]) -> Ranked:
        """That of some clients."""
        known = self.clients.intersection(clients)
        return Ranked(known, tuple(users.of_clients(known) for users in self.users))

    def __add__(self, other: Ranked) -> Ranked:
        pairs = zip(self.users, other.users, strict=True)
        return Ranked(self.clients | other.clients, tuple(mine.joined(theirs) for mine, theirs in pairs))


class KeptUsers:
    """Metrics by stored version of the adapter, changes of the base and stage, as long as the version exists.

    The adapter that a run starts from is a version of its own in every run of a comparison, so those are compared by
    their values.
    """

    def __init__(self) -> None:
        self._ranked: WeakKeyDictionary[StoredTensors, dict[tuple[str, Base], Ranked]] = WeakKeyDictionary()
        self._starts: dict[str, StoredTensors] = {}

    def of(self, job: ScoreJob, stage: str) -> Ranked | None:
        """What is known of a job's users."""
        found = self._ranked.get(job.adapter, {}).get((stage, job.base))
        return None if found is None else found.of(job.clients)

    def add(self, job: ScoreJob, stage: str, users: Sequence[UserMetrics]) -> None:
        """Keep the metrics of the users of a job's clients; those of other clients are ignored."""
        new = Ranked(frozenset(job.clients), tuple(users)).of(job.clients)
        of_version, key = self._ranked.setdefault(job.adapter, {}), (stage, job.base)
        of_version[key] = of_version[key] + new if key in of_version else new

    def begin(self, jobs: Iterable[ScoreJob]) -> None:
        """Let starting adapters have what is known of those of earlier runs with the same values."""
        for adapter in {job.adapter: None for job in jobs}:
            same = self._starts.setdefault(_digest(adapter), adapter)  # whose file may be gone
            if same is not adapter:
                known = self._ranked.get(same, {})
                self._ranked[adapter] = {key: ranked for key, ranked in known.items() if not key[1]}


class KeptOfPopulation:
    """What a checkpoint has of the kept metrics: the validation of the adapters that serve clients now.

    Batches have users of all clients with one adapter, and the last bits of a score depend on its batch. So a run that
    is resumed must not rank users again that the run without interruption does not.

    Args:
        kept: The metrics.
        population: Whose adapters they are of; loaded before.
    """

    def __init__(self, kept: KeptUsers, population: Population) -> None:
        self.kept = kept
        self.population = population

    def state_dict(self) -> dict[str, Any]:
        """See ``Persisted``; empty if one adapter serves all: no client keeps it when others have the next one."""
        jobs = one_job_per_adapter(self.population.score_jobs())
        found = [ranked for job in jobs if (ranked := self.kept.of(job, "val")) is not None and ranked.clients]
        if len(jobs) == 1 or not found:
            return {}
        choices = [
            {name: torch.cat([getattr(ranked.users[choice], name) for ranked in found]) for name in UserMetrics._fields}
            for choice in range(len(found[0].users))
        ]
        return {"clients": sorted(set().union(*(ranked.clients for ranked in found))), "choices": choices}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See ``Persisted``."""
        if not state:
            return
        users = [UserMetrics(**{name: choice[name] for name in UserMetrics._fields}) for choice in state["choices"]]
        for job in one_job_per_adapter(self.population.score_jobs()):
            known = tuple(sorted(set(job.clients) & set(state["clients"])))
            if known:
                self.kept.add(replace(job, clients=known), "val", users)


def one_job_per_adapter(jobs: Iterable[ScoreJob]) -> list[ScoreJob]:
    """The same jobs, those with one adapter as one."""
    found: dict[tuple[StoredTensors, Base], ScoreJob] = {}
    for job in jobs:
        key = job.adapter, job.base
        found[key] = replace(found[key], clients=(*found[key].clients, *job.clients)) if key in found else job
    return [replace(job, clients=tuple(sorted(job.clients))) for job in found.values()]


def _digest(adapter: StoredTensors) -> str:
    """Of names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(adapter.tensors().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
