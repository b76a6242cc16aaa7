"""The federated loop: read it from top to bottom. No aggregation rule's name appears in it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from lightning import Fabric
from torch import Tensor

from fellrec.data.datamodule import FellrecDataModule
from fellrec.errors import TrainingError
from fellrec.federated.client import LocalSettings, LocalTrainer
from fellrec.federated.hooks import FederatedCallback
from fellrec.federated.state import RunState
from fellrec.functional.participation import cohort
from fellrec.models.bank import AdapterBank
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
        reset_optimizer: Forget every client's optimiser state at the start of a round.
        participation_rate: Share of the clients in each round's cohort, in (0, 1].
        seed: Seed of the run.
    """

    num_rounds: int = 10
    evaluate_every: int = 1
    patience: int | None = None
    select: str = "population"
    reset_optimizer: bool = False
    participation_rate: float = 1.0
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
            if self.state.round_index == 0:
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
        started = time.perf_counter()
        self.call("on_round_start", round_index)
        clients = self.cohort(round_index)
        start = self.state.bank.stack(clients)
        updates = tuple(self.train_client(client, round_index) for client in clients)
        aggregated = self.aggregate(clients, start, updates, round_index)
        seconds = time.perf_counter() - started
        self.state.round_index = round_index + 1
        evaluation = self.validate(round_index) if self.is_evaluated(round_index) else None
        self.call("on_round_end", RoundRecord(round_index, updates, aggregated, evaluation, seconds))

    def cohort(self, round_index: int) -> tuple[int, ...]:
        """The rows of the bank that train in this round."""
        settings = self.settings
        return cohort(len(self.state.bank), settings.participation_rate, settings.seed, round_index)

    def train_client(self, client: int, round_index: int) -> ClientUpdate:
        """Put the client's adapter into the backbone, train it, and put it back into the bank."""
        self.call("on_client_start", client)
        state, parameters = self.state, self.module.trainable
        state.bank.copy_to(parameters, client)
        if self.settings.reset_optimizer:
            state.optimizers.pop(client, None)
        optimizer_state = state.take_optimizer(client)
        self.optimizer.state = optimizer_state  # type: ignore[assignment]
        data_of = None if self.aggregation.pools_clients else client
        update = self.trainer.train(client, data_of, round_index, state.local_steps[client], self._on_step)
        state.optimizers[client] = optimizer_state
        state.local_steps[client] += update.num_steps
        state.bank.store(client, parameters)
        self.call("on_client_end", update)
        return update

    def aggregate(
        self, clients: tuple[int, ...], start: dict[str, Tensor], updates: Sequence[ClientUpdate], round_index: int
    ) -> Aggregated:
        """Let the rule mix the cohort's adapters and put the result into the bank."""
        collected = Updates(
            clients=clients,
            start=start,
            end=self.state.bank.stack(clients),
            losses=torch.tensor([update.loss for update in updates], dtype=torch.float64),
            num_samples=torch.tensor([update.num_samples for update in updates], dtype=torch.float64),
        )
        _check_finite(collected, round_index)
        self.call("on_aggregate_start", collected)
        aggregated = self.aggregation.aggregate(collected, round_index)
        self.state.bank.replace(clients, aggregated.adapters)
        self.call("on_aggregate_end", aggregated)
        return aggregated

    def is_evaluated(self, round_index: int) -> bool:
        """Whether validation follows this round."""
        done = round_index + 1
        return done % self.settings.evaluate_every == 0 or done == self.settings.num_rounds

    def validate(self, round_index: int) -> Evaluation:
        """Evaluate the validation holdout with the adapters as they are, and remember them if they are the best."""
        evaluation = self.evaluate("val", round_index, self.state.bank, self.row_of_client)
        self.state.select(evaluation, self.row_of_client)
        return evaluation

    def test(self) -> Evaluation:
        """Evaluate the test holdout with the adapters that validation selected."""
        bank, row_of_client = self.selected
        return self.evaluate("test", self.state.selection.round_index, bank, row_of_client)

    @property
    def selected(self) -> tuple[AdapterBank, tuple[int, ...]]:
        """The adapters that validation selected, and the row that serves each client."""
        if self.settings.select == "client":
            return self.state.selection.client_bank, tuple(range(self.num_clients))
        return self.state.selection.bank, self.row_of_client

    def evaluate(self, stage: str, round_index: int, bank: AdapterBank, row_of_client: tuple[int, ...]) -> Evaluation:
        """Rank all items for all users of all clients, each with the adapter that serves their client.

        Args:
            stage: ``"val"`` or ``"test"``.
            round_index: The round that the adapters come from.
            bank: Adapters.
            row_of_client: Row of the bank that serves each client.
        """
        self.call("on_evaluate_start", stage)
        self.module.eval()
        for row in sorted(set(row_of_client)):
            clients = tuple(client for client, its_row in enumerate(row_of_client) if its_row == row)
            bank.copy_to(self.module.trainable, row)
            with self.fabric.autocast():
                self._score(stage, clients)
        evaluation = self.module.finish_evaluation(stage, round_index)
        self.call("on_evaluate_end", evaluation)
        return evaluation

    def call(self, hook: str, *arguments: object) -> None:
        """Call one hook of the aggregation and of every callback, in order."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    def _score(self, stage: str, clients: tuple[int, ...]) -> None:
        self.module.ranker.refresh(self.module.model)
        for batch in self.datamodule.eval_loader(stage, clients):
            self.module.score_batch(self.fabric.to_device(batch))

    def _on_step(self, loss: float) -> None:
        self.call("on_step_end", loss)


def _check_finite(updates: Updates, round_index: int) -> None:
    for name, stack in updates.end.items():
        finite = stack.flatten(1).isfinite().all(dim=1)
        if not bool(finite.all()):
            client = updates.clients[int(finite.logical_not().nonzero()[0])]
            raise TrainingError(
                f"{name} of client {client} is not finite after local training in round {round_index}; "
                "lower trainer.learning_rate"
            )
