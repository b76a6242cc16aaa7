"""The server's own training on the public users, in the loop with a fake executor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from fakes import FakeExecutor, fake_loop

from fellrec.aggregation import AggregationCallback, FLTrust
from fellrec.errors import TrainingError
from fellrec.federated.callback import Events, FederatedCallback
from fellrec.federated.ledger import Ledger
from fellrec.federated.populations import SharedAndRoot
from fellrec.federated.records import Aggregated, Failed, Job, RoundRecord, Trained, Updates
from fellrec.types import PUBLIC


class BelowTheRoot(AggregationCallback):
    """The next model is the server's own, minus 1."""

    population = SharedAndRoot

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        return self.shared(updates, {name: value - 1 for name, value in updates.root.items()})


class Watching(FakeExecutor):
    """Keeps all jobs, and records bytes of each, as an executed cut does."""

    def __init__(self, ledger: Ledger | None = None, fails: bool = False) -> None:
        super().__init__(fails=lambda job: fails and job.data_of == PUBLIC)
        self.jobs: list[Job] = []
        self.ledger = ledger

    def train(self, jobs: Sequence[Job], events: Events) -> Iterator[Trained | Failed]:
        self.jobs += jobs
        for job in jobs:
            if self.ledger is not None:
                self.ledger.add(job.row, job.round_index, "train", "up", "hidden_state", 10)
        yield from super().train(jobs, events)


def test_the_server_trains_the_same_model_on_the_public_users_in_every_round() -> None:
    """Row r adds r + 1, the server is row 4: after two rounds the model is 2 (5 - 1), with any cohort."""
    loop = fake_loop(BelowTheRoot(), executor := Watching(), participation={"rate": 0.5}, num_rounds=2)
    loop.run()
    assert [job.data_of for job in executor.jobs].count(PUBLIC) == 2
    assert all(job.row == 4 for job in executor.jobs if job.data_of == PUBLIC)
    starts = {round_index: set() for round_index in (0, 1)}  # type: dict[int, set[float]]
    for job in executor.jobs:
        starts[job.round_index].add(float(job.adapter.tensors()["a"][0]))
    assert starts == {0: {0.0}, 1: {4.0}}
    assert [float(loop.population.bank.row(row)["a"][0]) for row in range(5)] == [8.0] * 5


def test_the_server_is_no_client_of_the_run() -> None:
    seen: list[int] = []
    records: list[RoundRecord] = []

    class Clients(FederatedCallback):
        def on_round_end(self, record: RoundRecord) -> None:
            records.append(record)

        def on_client_start(self, job: Job) -> None:
            seen.append(job.row)

        def on_client_end(self, trained: Trained) -> None:
            seen.append(trained.row)

    loop = fake_loop(BelowTheRoot(), num_clients=2, num_rounds=1, callbacks=[Clients()])
    loop.executor = Watching(loop.exchange.ledger)
    result = loop.run()
    (record,) = records
    assert seen == [0, 0, 1, 1]
    assert [trained.row for trained in record.trained] == [0, 1] == list(record.clients)
    assert result.evaluation.per_client["ndcg_at_10"].shape == (2,)
    assert set(loop.exchange.ledger.frame()["client"]) == {0, 1}


def test_a_failure_of_the_server_ends_the_run_whatever_is_done_about_clients() -> None:
    loop = fake_loop(BelowTheRoot(), Watching(fails=True), participation={"on_failure": "skip", "quorum": 0.5})
    with pytest.raises(TrainingError, match="client 4 failed"):  # the fake executor's own message
        loop.run()
    assert Job(4, PUBLIC, 0, 0, loop.population.part(4)).who == "the server"


def test_a_run_that_stops_after_the_server_has_trained_does_not_train_it_again(tmp_path: Path) -> None:
    first, second = fake_loop(BelowTheRoot()), fake_loop(BelowTheRoot(), executor := Watching())
    for loop in (first, second):
        loop.population.persist(tmp_path)
    jobs = first.population.jobs(first.participation.draw(first.population, 0))
    first.train([jobs[-1]])
    second.run_round(0)
    assert [job.row for job in executor.jobs] == [0, 1, 2, 3]
    assert float(second.population.bank.row(0)["a"][0]) == 4.0


def test_fltrust_follows_the_clients_that_agree_with_the_server() -> None:
    """All move in one direction, by 1 to 4 an entry; the server by 5: all have its length, so the model moves by 5."""
    loop = fake_loop(FLTrust(), num_rounds=1)
    record = loop.run_round(0)
    torch.testing.assert_close(loop.population.model()["a"], torch.tensor([5.0, 5.0]))
    torch.testing.assert_close(record.aggregated.per_client["trust"], torch.ones(4).double())
