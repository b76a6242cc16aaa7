"""The federated loop: read it from top to bottom. No aggregation rule's name and no mode of execution appears in it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fellrec.errors import TrainingError
from fellrec.federated.callback import Events
from fellrec.federated.exchange import Exchange
from fellrec.federated.executor import Executor
from fellrec.federated.participation import Participation
from fellrec.federated.population import Population
from fellrec.federated.progress import Progress
from fellrec.federated.records import (
    Aggregated,
    Cohort,
    Failed,
    FitResult,
    FitStart,
    Job,
    LossJob,
    RoundRecord,
    ScoreJob,
    Trained,
    Updates,
)
from fellrec.federated.selection import Selection
from fellrec.federated.settings import TrainerSettings
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import Evaluation


class AggregationRule(Protocol):
    """What the loop asks of an aggregation rule; see ``fellrec.aggregation.AggregationCallback``."""

    def candidates(self, row: int, adapters: Sequence[StoredTensors], round_index: int) -> Sequence[StoredTensors]:
        """Adapters whose losses a client measures before it trains."""

    def start(self, row: int, candidates: Sequence[StoredTensors], losses: Tensor) -> Mapping[str, Tensor]:
        """What it trains from then."""

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """The next adapters of the clients in ``updates``."""


class FederatedLoop:
    """Runs rounds: cohort, local training, aggregation, evaluation; then tests the selected adapters once.

    Args:
        population: Adapters and optimiser states of all clients.
        participation: Who trains in a round, and how many must finish.
        executor: Where clients train and are evaluated.
        exchange: What leaves a client and comes back.
        rule: How updates become the next adapters.
        selection: The best adapters so far.
        progress: Where to start.
        events: Calls the callbacks' hooks.
        settings: How many rounds, and how often they are evaluated.
        steps_per_round: Optimiser steps of a round in which every client trains, for progress bars.
        server_steps: Optimiser steps of the server's own training in a round.
    """

    def __init__(
        self,
        population: Population,
        participation: Participation,
        executor: Executor,
        exchange: Exchange,
        rule: AggregationRule,
        selection: Selection,
        progress: Progress,
        events: Events,
        settings: TrainerSettings,
        steps_per_round: int = 0,
        server_steps: int = 0,
    ) -> None:
        self.population = population
        self.participation = participation
        self.executor = executor
        self.exchange = exchange
        self.rule = rule
        self.selection = selection
        self.progress = progress
        self.events = events
        self.settings = settings
        self.steps_per_round = steps_per_round
        self.server_steps = server_steps

    def run(self) -> FitResult:
        """Run all rounds that are left and test the selected adapters.

        Returns:
            The result, with the evaluation on the test data, made once, of the adapters that validation selected.

        Raises:
            TrainingError: If a client's training fails and the run must not continue without it.
        """
        try:
            self.events.call("on_fit_start", self.start())
            if not self.selection.is_started:  # also a run that is resumed before its first round was done
                self.validate(-1)
            while not self.is_over:
                # The record is not kept: it refers to adapters that the next round replaces.
                self.events.call("on_round_end", self.run_round(self.progress.round_index))
            result = self._result(self.test())
            self.events.call("on_fit_end", result)
        except BaseException as error:
            self.events.call("on_exception", error)
            raise
        return result

    def run_round(self, round_index: int) -> RoundRecord:
        """One round: who trains, with what, where, what leaves the clients, how it is aggregated, what comes back."""
        started = time.perf_counter()
        self.events.call("on_round_start", round_index)
        cohort = self.participation.draw(
            self.population, round_index, lambda participants: self.start_losses(participants, round_index)
        )
        model = self.population.model()
        outcomes, root = self.without_root(self.train(self.jobs(cohort)))
        outcomes = self.exchange.sent(outcomes, self.population.is_exchanged)
        trained = self.participation.quorum(cohort, outcomes)
        sending = [t for t in trained if self.population.is_exchanged(t.row)]
        updates = self.exchange.up(sending, model, root, cohort.rows, (*cohort.dropped, *cohort.late))
        self.events.call("on_aggregate_start", updates)
        aggregated = self.rule.aggregate(updates, round_index)
        self.population.receive(self.exchange.down(updates, aggregated))
        self.events.call("on_aggregate_end", aggregated)
        seconds = time.perf_counter() - started
        failed = tuple(outcome for outcome in outcomes if isinstance(outcome, Failed))
        self.participation.finish(cohort)
        self.progress.finish(round_index, failed, cohort.dropped)
        evaluation = self.validate(round_index) if self.is_evaluated(round_index) else None
        costs = self.exchange.costs(round_index, seconds)
        found = tuple(trained), aggregated, evaluation, seconds, costs, failed, self.is_over, updates.clients, cohort
        return RoundRecord(round_index, *found)

    def jobs(self, cohort: Cohort) -> list[Job]:
        """What the cohort starts with; clients first measure losses of other adapters if the rule asks for them."""
        round_index, jobs = cohort.round_index, self.population.jobs(cohort)
        adapters = self.population.bank.versions
        asked = {
            job.row: () if job.is_at_server else tuple(self.rule.candidates(job.row, adapters, round_index))
            for job in jobs
        }
        measured = self.measure(
            [
                LossJob(job.row, job.data_of, round_index, asked[job.row], job.adapter, job.base)
                for job in jobs
                if asked[job.row]
            ]
        )
        starts = {row: self.rule.start(row, asked[row], losses) for row, losses in measured.items()}
        return [self.population.started(job, starts[job.row]) if job.row in starts else job for job in jobs]

    def start_losses(self, participants: Sequence[int], round_index: int) -> dict[int, float]:
        """The losses of some participants at the model that each would start from, which is sent to them."""
        jobs = [
            self.population.job(self.population.rows_of(participant)[0], round_index) for participant in participants
        ]
        measured = self.measure(
            [LossJob(job.row, job.data_of, round_index, (job.adapter,), base=job.base) for job in jobs]
        )
        return {participant: float(measured[job.row]) for participant, job in zip(participants, jobs, strict=True)}

    def measure(self, jobs: Sequence[LossJob]) -> dict[int, Tensor]:
        """The losses that clients measure, by row; the adapters that are sent for it are recorded."""
        if not jobs:
            return {}
        losses = [torch.tensor(found, dtype=torch.float64) for found in self.executor.measure(jobs)]
        self.exchange.measured(jobs)
        return {job.row: found for job, found in zip(jobs, losses, strict=True)}

    @property
    def is_over(self) -> bool:
        """Whether no round is left: all are done, validation does not improve, or a callback stopped the run."""
        is_done = self.progress.round_index >= self.settings.num_rounds
        return is_done or self.selection.is_out_of_patience or self.events.is_stopping

    def is_evaluated(self, round_index: int) -> bool:
        """Whether validation follows this round."""
        done = round_index + 1
        return done % self.settings.evaluate_every == 0 or done == self.settings.num_rounds

    def train(self, jobs: Sequence[Job]) -> list[Trained | Failed]:
        """Carry out the jobs that were not finished before the run was stopped in this round; ordered by row."""
        outcomes: list[Trained | Failed] = []
        left = []
        for job in jobs:
            recovered = self.population.recover(job)
            if recovered is None:
                left.append(job)
            else:
                self.exchange.ledger.merge(recovered.traffic)
                outcomes.append(recovered)
        for outcome in self.executor.train(left, self.events):
            if isinstance(outcome, Failed):
                outcomes.append(outcome)
                continue
            outcomes.append(kept := self.population.keep(outcome))
            if not kept.job.is_at_server:
                self.events.call("on_client_end", kept)
        return sorted(outcomes, key=lambda outcome: outcome.row)

    def without_root(self, outcomes: Sequence[Trained | Failed]) -> tuple[list[Trained | Failed], Trained | None]:
        """The outcomes of the clients, and that of the server's own training, of which no traffic is recorded.

        Raises:
            TrainingError: If the server's training failed.
        """
        root = None
        for outcome in (outcome for outcome in outcomes if outcome.job.is_at_server):
            if isinstance(outcome, Failed):
                raise TrainingError(outcome.reason)
            root = outcome
            self.exchange.ledger.forget(outcome.row, outcome.job.round_index)
        return [outcome for outcome in outcomes if not outcome.job.is_at_server], root

    def validate(self, round_index: int) -> Evaluation:
        """Evaluate the validation data with the adapters as they are, and remember them if they are the best."""
        evaluation = self.evaluate(self.population.score_jobs(), "val", round_index)
        self.selection.update(evaluation)
        return evaluation

    def test(self) -> Evaluation:
        """Evaluate the test data with the adapters that validation selected."""
        return self.evaluate(self.selection.score_jobs(), "test", self.selection.round_index)

    def evaluate(self, jobs: Sequence[ScoreJob], stage: str, round_index: int) -> Evaluation:
        """Rank all items for all users of all clients, each with the adapter of their client's job."""
        self.events.call("on_evaluate_start", stage)
        evaluation = self.executor.score(jobs, stage, round_index)
        self.events.call("on_evaluate_end", evaluation)
        return evaluation

    def evaluate_start(self, stage: str) -> Evaluation:
        """Score the adapter that all clients started with; callbacks are not called."""
        adapters = [self.population.initial] * self.population.num_clients
        return self.executor.score(self.population.score_jobs_of(adapters, ()), stage, -1)

    def start(self) -> FitStart:
        """How long the run is, and how far."""
        share = self.participation.num_aggregated / self.participation.clients.num
        steps = int((self.steps_per_round * share + self.server_steps) * self.settings.num_rounds)
        return FitStart(
            num_rounds=self.settings.num_rounds,
            round_index=self.progress.round_index,
            num_clients=self.population.num_clients,
            num_steps=steps,
            steps_done=sum(self.population.local_steps),
        )

    def _result(self, evaluation: Evaluation) -> FitResult:
        selection = self.selection
        return FitResult(
            evaluation=evaluation,
            num_rounds=self.progress.round_index,
            best_round=selection.round_index,
            best_value=selection.value,
            served=selection.served,
            is_shared=len({job.row for job in selection.score_jobs()}) == 1,
            bases=selection.bases,
            failed_clients=self.progress.failed_clients,
        )
