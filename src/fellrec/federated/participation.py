"""Who takes part in a round, when it is over on the simulated clock, and how many must finish it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fellrec.errors import CheckpointError, ConfigError, TrainingError
from fellrec.federated.population import Population
from fellrec.federated.records import Cohort, Failed, Trained
from fellrec.federated.samplers import Sampler, UniformSampler
from fellrec.federated.settings import ParticipationSettings
from fellrec.functional.participation import cohort_size, drops_out, slowdowns
from fellrec.functional.rng import derive_seed

Measure = Callable[[Sequence[int]], Mapping[int, float]]
"""Gives each participant's loss at the model that it would start from; NaN if it failed."""


class Clients:
    """The clients as the server knows them before a round: how large they are, and how long they take.

    A client's training takes ``steps · step_seconds · slowdown`` simulated seconds; sending takes none.

    Args:
        settings: The simulated clock.
        seed: Of the run; decides who is slow.
        sizes: ``[C]`` training targets.
        num_steps: ``[C]`` optimiser steps of a round.
    """

    def __init__(
        self, settings: ParticipationSettings, seed: int, sizes: Sequence[int], num_steps: Sequence[int]
    ) -> None:
        self.num = len(sizes)
        self.sizes: NDArray[np.int64] = np.asarray(sizes, dtype=np.int64)
        slow = slowdowns(self.num, settings.slowdown, seed)
        self.seconds: NDArray[np.float64] = np.asarray(num_steps, dtype=np.float64) * settings.step_seconds * slow


class Participation:
    """Draws the cohort of a round: a pure function of the seed, the round and the simulated time.

    Args:
        settings: Fraction of the clients, the simulated clock, quorum, and what happens if a client fails.
        seed: Of the run.
        clients: Sizes and speeds of those that can be drawn.
        sampler: Who is drawn.
    """

    def __init__(
        self, settings: ParticipationSettings, seed: int, clients: Clients, sampler: Sampler | None = None
    ) -> None:
        self.settings = settings
        self.seed = seed
        self.clients = clients
        self.sampler = sampler or UniformSampler()
        self.seconds = 0.0
        self.sampler.check(clients.num, self.num_drawn)

    @property
    def num_needed(self) -> int:
        """Clients of a whole cohort."""
        return cohort_size(self.clients.num, self.settings.rate)

    @property
    def num_drawn(self) -> int:
        """Clients that are drawn for it."""
        return min(self.clients.num, math.ceil(self.settings.over_selection * self.num_needed - 1e-9))

    @property
    def num_aggregated(self) -> int:
        """Clients whose updates a whole round aggregates."""
        return self.num_needed

    @property
    def num_required(self) -> int:
        """Clients that must finish a round."""
        return max(1, math.ceil(self.settings.quorum * self.num_needed - 1e-9))

    def check(self, num_rounds: int, least_clients: int = 1) -> None:
        """Refuse, before anything is trained, a run in which a round would not have enough clients.

        Args:
            num_rounds: Rounds of the run.
            least_clients: Clients that the aggregation rule needs in each round.

        Raises:
            ConfigError: Naming the first such round.
        """
        is_random = self.sampler.is_random_size
        required = max(1 if is_random else self.num_required, least_clients)
        is_fixed = not (self.settings.dropout or self.sampler.fingerprint or is_random)
        if is_fixed and self.num_needed >= required:
            return
        seconds = 0.0
        for round_index in range(num_rounds):
            begun, drawn, dropped = self._draw(round_index, seconds)
            alive = np.setdiff1d(drawn, dropped)
            if (num := len(self._first(alive))) < required:
                why = f" ({len(dropped)} of {len(drawn)} drop out)" if len(dropped) else ""
                raise ConfigError(
                    f"round {round_index} has {num} clients{why} and needs {required}: lower participation.dropout="
                    f"{self.settings.dropout} or participation.quorum={self.settings.quorum}, or raise "
                    "participation.rate or participation.over_selection"
                )
            seconds = self._end(begun, self._first(alive))

    def draw(self, population: Population, round_index: int, measure: Measure | None = None) -> Cohort:
        """Who trains in a round.

        Args:
            population: Knows the rows of each client.
            round_index: From 0.
            measure: Needed by samplers that choose clients by their loss.

        Raises:
            ConfigError: If too few clients are available from now on.
        """
        begun, drawn, dropped = self._draw(round_index, self.seconds)
        alive = measured = np.setdiff1d(drawn, dropped)
        if self.sampler.by_loss:
            assert measure is not None, "this sampler needs the clients' losses"
            alive = self._with_largest_loss(alive, measure)
        kept = self._first(alive)
        rows = tuple(sorted(row for participant in kept.tolist() for row in population.rows_of(participant)))
        return Cohort(
            round_index=round_index,
            rows=rows,
            start_rounds=(round_index,) * len(rows),
            num_needed=len(kept) if self.sampler.is_random_size else self.num_needed,
            begun=begun,
            seconds=self._end(begun, kept),
            dropped=tuple(dropped.tolist()),
            late=tuple(np.setdiff1d(alive, kept).tolist()),
            oldest=round_index + 1,
            measured=tuple(measured.tolist()) if self.sampler.by_loss else (),
        )

    def finish(self, cohort: Cohort) -> None:
        """A round is over: the simulated clock goes on."""
        self.seconds = cohort.seconds

    def quorum(self, cohort: Cohort, outcomes: Sequence[Trained | Failed]) -> list[Trained]:
        """Those of the cohort that finished; a client has finished if all of its models have.

        Raises:
            TrainingError: If one failed and ``on_failure`` is ``"stop"``, or too few finished.
        """
        finished = [outcome for outcome in outcomes if isinstance(outcome, Trained)]
        failed = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
        if failed and self.settings.on_failure == "stop":
            raise TrainingError(failed[0].reason)
        clients = {outcome.job.client for outcome in outcomes}
        complete = clients - {outcome.job.client for outcome in failed}
        required = max(1, math.ceil(self.settings.quorum * cohort.num_needed - 1e-9))
        if len(complete) < required:
            reasons = [outcome.reason for outcome in failed]
            reasons += [f"{len(cohort.dropped)} clients dropped out"] if cohort.dropped else []
            raise TrainingError(
                f"only {len(complete)} of {cohort.num_needed} clients finished round {cohort.round_index}, "
                f"participation.quorum={self.settings.quorum} needs {required}; " + "; ".join(reasons)
            )
        return [outcome for outcome in finished if outcome.job.client in complete]

    def state_dict(self) -> dict[str, Any]:
        """See ``Persisted``."""
        return {"seconds": self.seconds, "sampler": self.sampler.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Persisted``.

        Raises:
            CheckpointError: If the sampler has another file than the run began with.
        """
        if state["sampler"] != self.sampler.fingerprint:
            raise CheckpointError(
                "participation.sampler.path is another file than the one that the run was started with: the clients of "
                "a round would be others"
            )
        self.seconds = float(state["seconds"])

    def _draw(self, round_index: int, seconds: float) -> tuple[float, NDArray[np.int64], NDArray[np.int64]]:
        """When a round begins, who is drawn, and who of them drops out."""
        begun, available = self._wait(seconds, self.num_required, round_index)
        generator = np.random.default_rng(derive_seed(self.seed, "cohort", round_index))
        count = min(len(available), self.num_drawn)
        drawn = np.sort(self.sampler.draw(available, self.clients.sizes[available], count, generator))
        drops = drops_out(self.clients.num, self.settings.dropout, self.seed, round_index)
        return begun, drawn, drawn[drops[drawn]]

    def _wait(self, seconds: float, least: int, round_index: int) -> tuple[float, NDArray[np.int64]]:
        """The first time from ``seconds`` at which so many clients are available, and who they are."""
        most = 0
        for time in (seconds, *self.sampler.changes(seconds)):
            available = np.flatnonzero(self.sampler.available(self.clients.num, time))
            if len(available) >= least:
                return time, available
            most = max(most, len(available))
        raise ConfigError(
            f"round {round_index} needs {least} clients, and from {seconds:g} simulated seconds on at most {most} are "
            "available at the same time: give participation.sampler.path more times or participation.sampler.period, "
            "or lower participation.quorum or participation.rate"
        )

    def _first(self, alive: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those who finish first, as many as the cohort needs; of equally fast ones the first by number."""
        if self.sampler.is_random_size:
            return alive
        order = np.argsort(self.clients.seconds[alive], kind="stable")
        return np.sort(alive[order[: self.num_needed]])

    def _end(self, begun: float, kept: NDArray[np.int64]) -> float:
        return begun + float(self.clients.seconds[kept].max(initial=0.0))

    def _with_largest_loss(self, candidates: NDArray[np.int64], measure: Measure) -> NDArray[np.int64]:
        """Let candidates measure their loss: of equal ones the first by number, and those that failed last."""
        measured = measure(candidates.tolist())
        losses = np.array([measured[client] for client in candidates.tolist()])
        order = np.argsort(-np.where(np.isfinite(losses), losses, -math.inf), kind="stable")
        return np.sort(candidates[order[: self.num_drawn]])


class AllAtOnce(Participation):
    """All participants in every round, such as the one model that is trained on pooled data: none is absent or slow.

    Args:
        settings: What happens if a training fails.
        seed: Of the run.
        num_steps: Optimiser steps of each participant.
    """

    def __init__(self, settings: ParticipationSettings, seed: int, num_steps: Sequence[int]) -> None:
        on_failure, quorum = settings.on_failure, settings.quorum
        plain = ParticipationSettings(on_failure=on_failure, quorum=quorum, step_seconds=settings.step_seconds)
        super().__init__(plain, seed, Clients(plain, seed, [1] * len(num_steps), num_steps))
