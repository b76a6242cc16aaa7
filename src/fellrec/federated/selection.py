"""The best adapters so far on the validation data, which is all that selection and early stopping see."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fellrec.data.guards import check_selection
from fellrec.federated.population import Population
from fellrec.federated.records import ScoreJob
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import Evaluation


@dataclass(frozen=True)
class Candidate:
    """A round that ``select=frontier`` may choose.

    Attributes:
        mean: Over clients.
        worst: Smallest value of a client.
        round_index: The round.
        served: The adapter of each client.
        base_version: Changes of the base by then.
    """

    mean: float
    worst: float
    round_index: int
    served: tuple[StoredTensors, ...]
    base_version: int


class Selection:
    """Remembers the best round of the population's mean, and each client's own best round.

    Adapters are remembered by their stored version; nothing is copied.

    Args:
        population: Whose adapters are selected.
        metric: Metric name, higher is better.
        select: What is tested: the best round of the ``"population"``, of each ``"client"``, or of the ``"frontier"``.
        patience: Evaluations without a gain after which a run ends; ``None`` never ends it early.
        floor: With ``"frontier"``, the smallest mean that is accepted, as a fraction of the best one.

    Attributes:
        value: Mean over clients in the selected round.
        round_index: That round; -1 is the start.
        client_values: Best value of each client.
        client_rounds: The round of that value; of a client without validation users, the best of the population.
        rounds_without_gain: Evaluations since the best one.
    """

    def __init__(
        self,
        population: Population,
        metric: str,
        select: str = "population",
        patience: int | None = None,
        floor: float = 1.0,
    ) -> None:
        self.population = population
        self.metric = metric
        self.select = select
        self.patience = patience
        self.floor = floor
        self.value = -float("inf")
        self.round_index = -1
        self.rounds_without_gain = 0
        self.client_values = [-float("inf")] * population.num_clients
        self.client_rounds = [-1] * population.num_clients
        self.is_started = False
        self._served = [population.initial] * population.num_clients
        self._client_served = list(self._served)
        self._base: tuple[StoredTensors, ...] = ()
        self._client_base = [0] * population.num_clients
        self._candidates: list[Candidate] = []

    @property
    def is_out_of_patience(self) -> bool:
        """Whether validation has not improved for ``patience`` evaluations."""
        return self.patience is not None and self.rounds_without_gain >= self.patience

    def update(self, evaluation: Evaluation) -> None:
        """Compare an evaluation of the population's current adapters with the best so far.

        Raises:
            LeakError: If the evaluation is not of the validation data.
        """
        check_selection(evaluation.stage)
        self.is_started = True
        served = [job.adapter for job in self._jobs_by_client(self.population.score_jobs())]
        values = evaluation.per_client[self.metric].tolist()
        for client, value in enumerate(values):
            if value > self.client_values[client]:
                self.client_values[client], self.client_rounds[client] = value, evaluation.round_index
                self._client_served[client] = served[client]
                self._client_base[client] = len(self.population.base)
        mean = evaluation.summary[f"{self.metric}/mean"]
        is_best = mean > self._best_mean
        self.rounds_without_gain = 0 if is_best else self.rounds_without_gain + 1
        if self.select == "frontier":
            self._consider(evaluation, mean, served)
        elif is_best:
            self.value, self.round_index = mean, evaluation.round_index
            self._served, self._base = served, self.population.base
        if is_best:
            for client in (client for client, value in enumerate(values) if math.isnan(value)):  # without users
                self.client_rounds[client], self._client_served[client] = evaluation.round_index, served[client]
                self._client_base[client] = len(self.population.base)

    @property
    def _best_mean(self) -> float:
        return max((candidate.mean for candidate in self._candidates), default=self.value)

    def _consider(self, evaluation: Evaluation, mean: float, served: list[StoredTensors]) -> None:
        """Select among the rounds near the best mean; those that can never be selected are dropped.

        A round can be selected as long as no other is at least as good in both mean and worst client.
        """
        worst = evaluation.summary[f"{self.metric}/worst"]
        new = Candidate(mean, worst, evaluation.round_index, tuple(served), len(self.population.base))
        kept = [old for old in self._candidates if not (mean > old.mean and worst > old.worst)]
        if not any(old.mean >= mean and old.worst >= worst for old in kept):
            kept.append(new)
        best = max(candidate.mean for candidate in kept)
        # Means are not negative: the best one never becomes smaller, and neither does the floor.
        self._candidates = [candidate for candidate in kept if candidate.mean >= self.floor * best]
        chosen = max(self._candidates, key=lambda candidate: (candidate.worst, candidate.mean))
        self.value, self.round_index = chosen.mean, chosen.round_index
        self._served, self._base = list(chosen.served), self.population.base[: chosen.base_version]

    def score_jobs(self) -> list[ScoreJob]:
        """Every client's users with the selected adapters."""
        if self.select == "client":
            pairs = zip(self._client_served, self.bases, strict=True)
            return [ScoreJob(client, adapter, (client,), base) for client, (adapter, base) in enumerate(pairs)]
        return self.population.score_jobs_of(self._served, self._base)

    @property
    def served(self) -> list[StoredTensors]:
        """The selected adapter of each client."""
        return list(self._client_served if self.select == "client" else self._served)

    @property
    def bases(self) -> list[tuple[StoredTensors, ...]]:
        """The changes of the base that each client's selected adapter was evaluated with."""
        if self.select == "client":
            return [self.population.base[:length] for length in self._client_base]
        return [self._base] * self.population.num_clients

    def state_dict(self) -> dict[str, Any]:
        """See ``Persisted``."""
        scalars = {name: getattr(self, name) for name in _SCALARS}
        return {
            **scalars,
            "served": self._served,
            "client_served": self._client_served,
            "base_version": len(self._base),
            "client_base_versions": self._client_base,
            "candidates": [
                {**{name: getattr(c, name) for name in _OF_CANDIDATE}, "served": list(c.served)}
                for c in self._candidates
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Persisted``; the population is loaded before, which names what its adapters must be."""
        self.population.bank.check([*state["served"], *state["client_served"]])
        for name in _SCALARS:
            setattr(self, name, state[name])
        self._served, self._client_served = list(state["served"]), list(state["client_served"])
        self._base = self.population.base[: state["base_version"]]
        self._client_base = list(state["client_base_versions"])
        found = state.get("candidates", [])
        self.population.bank.check(stored for item in found for stored in item["served"])
        self._candidates = [Candidate(**{**item, "served": tuple(item["served"])}) for item in found]

    def _jobs_by_client(self, jobs: list[ScoreJob]) -> list[ScoreJob]:
        by_client = {client: job for job in jobs for client in job.clients}
        return [by_client[client] for client in range(self.population.num_clients)]


_OF_CANDIDATE = ("mean", "worst", "round_index", "base_version")
_SCALARS = ("value", "round_index", "rounds_without_gain", "client_values", "client_rounds", "is_started")
