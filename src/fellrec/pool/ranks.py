"""Clients over ranks: every rank has the whole backbone, and trains and scores the clients that are placed on it.

The results do not depend on who does what: a client's training is a function of its adapter, its optimiser's moments
and (seed, round, client). So rank 0 keeps all state and may place clients as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fellrec.cut.messages import Done, Message, Scored, Stop
from fellrec.cut.pipeline import Outcome
from fellrec.data.datamodule import evaluated_users
from fellrec.distributed.channel import Wire
from fellrec.distributed.memory import peak_bytes
from fellrec.errors import SplitError, TrainingError
from fellrec.federated.executor import WholeExecution, note_failure
from fellrec.federated.slot import load_optimizer, read_optimizer
from fellrec.functional.placement import estimate_seconds
from fellrec.pool.crew import LEAD, Crew, Job
from fellrec.pool.messages import (
    Begin,
    Begun,
    Failed,
    Finished,
    ScoreClients,
    TrainClient,
)
from fellrec.state.bank import AdapterBank
from fellrec.types import Adapter, ClientUpdate

if TYPE_CHECKING:
    from fellrec.federated.loop import FederatedLoop

_SECONDS = "client_seconds"
"""Where the run's state keeps how long each client's training took the last time."""


class RankedExecution(WholeExecution):
    """One model per rank, as the leading rank sees it.

    Args:
        crew: The ranks.
    """

    def __init__(self, crew: Crew) -> None:
        super().__init__()
        self.crew = crew
        self._busy_seconds = 0.0
        self._peak_bytes = 0

    def train(self, loop: FederatedLoop, clients: Sequence[int], round_index: int) -> Outcome:
        """Every rank trains its clients at the same time, the longest first."""
        outcome = Outcome()
        left = [client for client in clients if not self.recover(loop, client, outcome)]
        jobs = [self._training(loop, client, round_index, outcome) for client in left]
        measured: dict[str, float] = loop.state.extras.setdefault(_SECONDS, {})
        steps = {client: loop.trainer.num_steps(loop.data_of(client)) for client in left}
        known = {int(client): seconds for client, seconds in measured.items()}
        self.crew.run(jobs, estimate_seconds(left, steps, known), together=True)
        outcome.updates.sort(key=lambda update: clients.index(update.client))
        measured.update({str(update.client): update.seconds for update in outcome.updates})
        self._busy_seconds = sum(update.seconds for update in outcome.updates)
        return outcome

    def on_step(self, loop: FederatedLoop, loss: float) -> None:
        """Attend to the other ranks between two local steps."""
        super().on_step(loop, loss)
        self.crew.attend()

    def score(self, loop: FederatedLoop, stage: str, round_index: int, bank: str, rows: Sequence[int]) -> None:
        """Every rank scores the users of some rows; if there are more ranks than rows, several share a row's users."""
        client_of_user = loop.datamodule.data.client_of_user
        users = np.bincount(
            client_of_user[evaluated_users(loop.datamodule.data, stage)], minlength=loop.num_clients
        ).tolist()
        num_parts = max(1, self.crew.num_ranks // len(rows))
        jobs, costs = [], []
        for row in rows:
            for part in range(num_parts):
                jobs.append(self._scoring(loop, ScoreClients(stage, bank, row, part, num_parts, {})))
                costs.append(sum(users[client] for client in loop.clients_served_by(row, bank)) / num_parts)
        self.crew.run(jobs, costs)

    def costs(self, seconds: float) -> dict[str, float]:
        """How busy the ranks were, and the largest memory of one."""
        there = len(self.crew.groups) * seconds
        return {
            "cost/rank/busy_rate": min(1.0, self._busy_seconds / there) if there else 0.0,
            "cost/rank/peak_bytes": float(max(self._peak_bytes, peak_bytes())),
        }

    def _training(self, loop: FederatedLoop, client: int, round_index: int, outcome: Outcome) -> Job:
        state = loop.state

        def order() -> Message:
            moments = state.take_optimizer(client, loop.trainer.settings.reset_optimizer)
            return TrainClient(client, round_index, state.local_steps[client], state.bank.row(client), moments)

        def accept(answer: Message) -> None:
            loop.call("on_client_start", client)
            if isinstance(answer, Failed):
                outcome.failures[client] = answer.reason
                return
            if not isinstance(answer, Finished) or answer.client != client:
                raise SplitError(f"a rank answered the training of client {client} with {type(answer).__name__}")
            update = ClientUpdate(client, answer.num_samples, answer.num_steps, answer.loss, answer.seconds)
            state.finish(update, answer.adapter, answer.moments)
            self._peak_bytes = max(self._peak_bytes, answer.peak_bytes)
            for loss in answer.step_losses:
                loop.on_step(loss)
            outcome.updates.append(update)
            loop.call("on_client_end", update)

        def drop(reason: str) -> None:
            outcome.failures[client] = reason

        return Job(
            order=order,
            do=lambda: self.train_one(loop, client, round_index, outcome),
            accept=accept,
            drop=drop,
            text=f"training client {client} in round {round_index}",
        )

    def _scoring(self, loop: FederatedLoop, what: ScoreClients) -> Job:
        adapters = loop.state.bank_named(what.bank)

        def do() -> None:
            adapters.copy_to(loop.module.trainable, what.row)
            loop.score_row(what.stage, what.row, what.bank, what.part, what.num_parts)

        def accept(answer: Message) -> None:
            if not isinstance(answer, Scored):
                raise SplitError(f"a rank answered the scoring of row {what.row} with {type(answer).__name__}")
            loop.module.add_users(answer.users)

        return Job(
            order=lambda: ScoreClients(
                what.stage, what.bank, what.row, what.part, what.num_parts, dict(adapters.row(what.row))
            ),
            do=do,
            accept=accept,
            drop=None,
            text=f"scoring the users of client {what.row}",
        )


class RankWorker:
    """A rank other than the first: does as it is told, and keeps nothing.

    Args:
        wire: Of this process.
        make_loop: Makes a loop for a run that begins, with this rank's backbone; it has no callbacks and no clients'
            adapters, and is not run.
    """

    def __init__(self, wire: Wire, make_loop: Callable[[Begin], FederatedLoop]) -> None:
        self.wire = wire
        self._make_loop = make_loop
        self._loop: FederatedLoop | None = None

    @property
    def loop(self) -> FederatedLoop:
        """Of the run that began last."""
        assert self._loop is not None, "rank 0 begins a run first"
        return self._loop

    def run(self) -> None:
        """Do what is asked until no run is left."""
        while not isinstance(message := self.wire.receive(LEAD), Stop):
            match message:
                case Begin():
                    self._loop = self._make_loop(message)
                    self.wire.send(LEAD, Begun())
                case TrainClient():
                    answer, sharing = self._train(message), self.loop.trainer.sharing
                    if sharing is None or sharing.position == 0:  # one speaks for those that train a client together
                        self.wire.send(LEAD, answer)
                case ScoreClients():
                    self.wire.send(LEAD, self._score(message))
                case _:
                    raise SplitError(f"rank {self.wire.rank} has no use for {type(message).__name__}")
        self.wire.send(LEAD, Done())

    def _train(self, order: TrainClient) -> Message:
        loop, trainable, client = self.loop, self.loop.module.trainable, order.client
        self.wire.where = f" while this rank was training client {client} in round {order.round_index}"
        self._put_in(order.adapter)
        load_optimizer(loop.optimizer, trainable, order.moments)
        losses: list[float] = []

        def on_step(loss: float) -> None:
            losses.append(loss)
            self.wire.check()

        try:
            update = loop.trainer.train(client, loop.data_of(client), order.round_index, order.first_step, on_step)
        except SplitError:
            raise
        except TrainingError as error:
            return Failed(client, note_failure(error))
        return Finished(
            client=client,
            num_samples=update.num_samples,
            num_steps=update.num_steps,
            loss=update.loss,
            seconds=update.seconds,
            step_losses=tuple(losses),
            adapter={name: parameter.detach() for name, parameter in trainable.items()},
            moments=read_optimizer(loop.optimizer, trainable),
            peak_bytes=peak_bytes(),
        )

    def _score(self, order: ScoreClients) -> Message:
        self.wire.where = f" while this rank was scoring users of client {order.row}"
        self._put_in(order.adapter)
        self.loop.module.eval()
        self.loop.score_row(order.stage, order.row, order.bank, order.part, order.num_parts)
        return Scored(self.loop.module.take_users(), ())

    def _put_in(self, adapter: Adapter) -> None:
        AdapterBank.replicate(adapter, 1).copy_to(self.loop.module.trainable, 0)
