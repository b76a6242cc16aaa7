"""The federated loop: read it from top to bottom. No aggregation rule's name appears in it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning import Fabric

from fellrec.cut.pipeline import Outcome
from fellrec.data.datamodule import FellrecDataModule
from fellrec.errors import TrainingError
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.executor import Execution, WholeExecution
from fellrec.federated.local import LocalSettings, LocalTrainer
from fellrec.federated.state import RunState
from fellrec.functional.participation import cohort
from fellrec.functional.stacks import AdapterStack
from fellrec.models.module import FellrecModule
from fellrec.types import Aggregated, ClientUpdate, Evaluation, RoundRecord, Updates

if TYPE_CHECKING:
    from fellrec.aggregation.base import AggregationCallback


@dataclass(frozen=True)
class LoopSettings:
    """How long and how often.

    Attributes:
        num_rounds: Rounds of the run.
        evaluate_every: Validate after every so many rounds (and after the last).
        patience: Stop after so many evaluations without a gain; ``None`` never stops early.
        select: ``"population"`` tests the best round of the population's mean, ``"client"`` each client's own best.
        participation_rate: Share of the clients in each round's cohort, in (0, 1].
        on_failure: ``"stop"`` ends the run when a client's training fails, ``"skip"`` leaves it out of the round.
        quorum: Share of the cohort that must finish a round, in (0, 1].
        checkpoints_kept: Checkpoints that stay on disk.
        seed: Seed of the run.
    """

    num_rounds: int = 10
    evaluate_every: int = 1
    patience: int | None = None
    select: str = "population"
    participation_rate: float = 1.0
    on_failure: str = "stop"
    quorum: float = 0.5
    checkpoints_kept: int = 2
    seed: int = 0


class FederatedLoop:
    """Runs rounds: cohort, local training, aggregation, evaluation; then tests the selected adapters once.

    Args:
        fabric: Device and precision.
        module: The recommender, one backbone for all clients.
        datamodule: Batches by client.
        aggregation: The one aggregation callback of the run.
        callbacks: Observers; the aggregation's own hooks are called before theirs.
        state: Where to start; ``run`` changes it.
        settings: How long and how often.
        local: How a client trains.
        execution: Where the parts of the model run.
    """

    def __init__(
        self,
        fabric: Fabric,
        module: FellrecModule,
        datamodule: FellrecDataModule,
        aggregation: AggregationCallback,
        callbacks: Sequence[FederatedCallback],
        state: RunState,
        settings: LoopSettings,
        local: LocalSettings,
        execution: Execution | None = None,
    ) -> None:
        self.fabric = fabric
        self.module = module
        self.datamodule = datamodule
        self.aggregation = aggregation
        self.callbacks = [aggregation, *callbacks]
        self.state = state
        self.settings = settings
        self.optimizer = module.configure_optimizers()
        self.trainer = LocalTrainer(fabric, module, datamodule, self.optimizer, local)
        self.execution = execution or WholeExecution()
        self.num_clients = datamodule.data.num_clients
        self.row_of_client = (0,) * self.num_clients if aggregation.pools_clients else tuple(range(self.num_clients))
        self.test_evaluation: Evaluation | None = None

    def run(self) -> Evaluation:
        """Run all rounds that are left and test the selected adapters.

        Returns:
            The evaluation on the test holdout, made once, with the adapters that validation selected.

        Raises:
            TrainingError: If a client's loss or adapter is no longer finite. Callbacks keep the last good state.
        """
        try:
            self.call("on_fit_start")
            self.execution.start(self)
            if not self.state.selection.client_values:  # else a run that was resumed before its first round was done
                self.validate(round_index=-1)
            while self.state.round_index < self.settings.num_rounds and not self.out_of_patience:
                self.run_round(self.state.round_index)
            self.test_evaluation = self.test()
            self.call("on_fit_end")
        except BaseException as error:
            self.call("on_exception", error)
            raise
        return self.test_evaluation

    @property
    def out_of_patience(self) -> bool:
        """Whether validation has not improved for ``settings.patience`` evaluations."""
        patience = self.settings.patience
        return patience is not None and self.state.rounds_without_gain >= patience

    def run_round(self, round_index: int) -> None:
        """Cohort → local training → aggregation → evaluation → report."""
        self.execution.start_round()
        started = time.perf_counter()
        self.call("on_round_start", round_index)
        clients = self.cohort(round_index)
        before = {client: self.state.bank.versions[client] for client in clients}
        outcome = self.train(clients, round_index)
        start = self.state.bank.stack_of([before[update.client] for update in outcome.updates])
        aggregated = self.aggregate(start, outcome.updates, round_index)
        seconds = time.perf_counter() - started
        costs = self.execution.costs(seconds)
        self.state.round_index = round_index + 1
        evaluation = self.validate(round_index) if self.is_evaluated(round_index) else None
        costs |= self.execution.ledger.metrics(round_index)
        updates, dropped = tuple(outcome.updates), tuple(outcome.failures)
        self.call("on_round_end", RoundRecord(round_index, updates, aggregated, evaluation, seconds, costs, dropped))

    def cohort(self, round_index: int) -> tuple[int, ...]:
        """The rows of the bank that train in this round."""
        settings = self.settings
        return cohort(len(self.state.bank), settings.participation_rate, settings.seed, round_index)

    def data_of(self, client: int) -> int | None:
        """The client whose data a row of the bank is trained on; ``None`` for that of all."""
        return None if self.aggregation.pools_clients else client

    def train(self, clients: tuple[int, ...], round_index: int) -> Outcome:
        """Train every client of the cohort, each from its own adapter.

        Raises:
            TrainingError: If a client failed and ``on_failure`` is ``"stop"``, or too few are left.
        """
        outcome = self.execution.train(self, clients, round_index)
        if outcome.failures:
            self._drop_out(outcome, len(clients), round_index)
        return outcome

    def aggregate(self, start: AdapterStack, updates: Sequence[ClientUpdate], round_index: int) -> Aggregated:
        """Let the rule mix the adapters of the clients that finished; the result is in the bank.

        Args:
            start: The clients' adapters before the round, name → ``[N, *shape]``.
            updates: Of the same clients, in the same order.
            round_index: From 0.
        """
        clients = tuple(update.client for update in updates)
        collected = Updates(
            clients=clients,
            start=start,
            end=self.state.bank.stack(clients),
            losses=torch.tensor([update.loss for update in updates], dtype=torch.float64),
            num_samples=torch.tensor([update.num_samples for update in updates], dtype=torch.float64),
        )
        self.call("on_aggregate_start", collected)
        aggregated = self.execution.aggregate(self, collected, round_index)
        self.call("on_aggregate_end", aggregated)
        return aggregated

    def is_evaluated(self, round_index: int) -> bool:
        """Whether validation follows this round."""
        done = round_index + 1
        return done % self.settings.evaluate_every == 0 or done == self.settings.num_rounds

    def validate(self, round_index: int) -> Evaluation:
        """Evaluate the validation holdout with the adapters as they are, and remember them if they are the best."""
        evaluation = self.evaluate("val", round_index, "current", self.row_of_client)
        is_best, better = self.state.select(evaluation, self.row_of_client)
        self.execution.keep_best(is_best, better, tuple(self.row_of_client[client] for client in better))
        return evaluation

    def test(self) -> Evaluation:
        """Evaluate the test holdout with the adapters that validation selected."""
        bank, row_of_client = self.selected
        return self.evaluate("test", self.state.selection.round_index, bank, row_of_client)

    @property
    def selected(self) -> tuple[str, tuple[int, ...]]:
        """The bank of the adapters that validation selected, see ``RunState.bank_named``, and each client's row."""
        if self.settings.select == "client":
            return "best_per_client", tuple(range(self.num_clients))
        return "best", self.row_of_client

    def evaluate(self, stage: str, round_index: int, bank: str, row_of_client: tuple[int, ...]) -> Evaluation:
        """Rank all items for all users of all clients, each with the adapter that serves their client.

        Args:
            stage: ``"val"`` or ``"test"``.
            round_index: The round that the adapters come from.
            bank: Which adapters, see ``RunState.bank_named``.
            row_of_client: Row of the bank that serves each client.
        """
        self.call("on_evaluate_start", stage)
        evaluation = self._score(stage, round_index, bank, row_of_client)
        self.call("on_evaluate_end", evaluation)
        return evaluation

    def evaluate_start(self, stage: str) -> Evaluation:
        """Score the adapters that all clients started with; no callback hears of it."""
        return self._score(stage, -1, "initial", self.row_of_client)

    def _score(self, stage: str, round_index: int, bank: str, row_of_client: tuple[int, ...]) -> Evaluation:
        """Score and summarise; before a test, let the same adapters' validation choose what the ranker leaves open."""
        self.module.eval()
        rows = sorted(set(row_of_client))
        if stage == "test" and self.module.chooses_on_validation:
            self.execution.score(self, "val", round_index, bank, rows)
            self.module.finish_evaluation("val", round_index)
        self.execution.score(self, stage, round_index, bank, rows)
        return self.module.finish_evaluation(stage, round_index)

    def clients_served_by(self, row: int, bank: str) -> tuple[int, ...]:
        """The clients whose users are scored with a row of a bank."""
        serves_all = self.aggregation.pools_clients and bank != "best_per_client"
        return tuple(range(self.num_clients)) if serves_all else (row,)

    def score_row(
        self, stage: str, row: int, bank: str, part: int = 0, num_parts: int = 1, is_new: bool = True
    ) -> None:
        """Score the users whom a row of a bank serves, with the adapter that is in the backbone now.

        Args:
            stage: ``"val"`` or ``"test"``.
            row: Of the bank.
            bank: See ``RunState.bank_named``.
            part: Score this one of ``num_parts`` parts; batches are dealt out, never split, so that no figure changes.
            num_parts: Processes that share the row's users.
            is_new: Whether the adapter is another one than at the last call.
        """
        with self.fabric.autocast():
            if is_new:
                self.module.ranker.refresh(self.module.model)
            for number, batch in enumerate(self.datamodule.eval_loader(stage, self.clients_served_by(row, bank))):
                if number % num_parts == part:
                    self.module.score_batch(self.fabric.to_device(batch), keep_rankings=stage == "test")

    def on_step(self, loss: float) -> None:
        """Report one optimiser step."""
        self.call("on_step_end", loss)

    def _drop_out(self, outcome: Outcome, num_clients: int, round_index: int) -> None:
        if self.settings.on_failure == "stop":
            raise TrainingError(next(iter(outcome.failures.values())))
        least = max(1, math.ceil(self.settings.quorum * num_clients - 1e-9))
        if len(outcome.updates) < least:
            raise TrainingError(
                f"only {len(outcome.updates)} of {num_clients} clients finished round {round_index}, "
                f"participation.quorum={self.settings.quorum} needs {least}; " + "; ".join(outcome.failures.values())
            )
        dropped: dict[str, list[int]] = self.state.extras.setdefault("dropped_clients", {})
        dropped[str(round_index)] = sorted(outcome.failures)

    def call(self, hook: str, *arguments: object) -> None:
        """Call one hook of the aggregation and of every callback, in order."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)
