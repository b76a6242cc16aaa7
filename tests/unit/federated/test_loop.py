"""The loop with a fake executor: cohort, quorum, selection, early stop, resume and hook order, in milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fakes import FakeExecutor, adapters, fake_loop, resumed

from fellrec.aggregation import FedAvg, FELLRec, Local
from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.errors import Preempted, TrainingError
from fellrec.federated.callback import HOOKS, FederatedCallback
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.populations import SharedAndPersonal
from fellrec.federated.records import Job, RoundRecord, Trained
from fellrec.functional.participation import cohort


class Recorder(FederatedCallback):
    """Keeps the records of all rounds."""

    def __init__(self) -> None:
        self.records: list[RoundRecord] = []

    def on_round_end(self, record: RoundRecord) -> None:
        self.records.append(record)


def test_a_round_of_fedavg_is_the_mean_weighted_by_samples() -> None:
    """Row r adds r + 1 and has r + 1 samples: (1·1 + 2·2 + 3·3 + 4·4) / (1 + 2 + 3 + 4) = 3."""
    loop = fake_loop()
    loop.run_round(0)
    assert adapters(loop) == [{"a": [3.0, 3.0], "b": [3.0, 3.0]}] * 4


def test_hooks_are_called_in_order() -> None:
    seen: list[str] = []

    def record(name: str) -> Callable[..., None]:
        return lambda self, *records: seen.append(name)

    recorder = type("Recorder", (FederatedCallback,), {name: record(name) for name in HOOKS})()
    fake_loop(num_clients=2, num_rounds=1, callbacks=[recorder]).run()
    assert seen == [
        "on_fit_start",
        *["on_evaluate_start", "on_evaluate_end"],
        "on_round_start",
        *["on_client_start", "on_client_end"] * 2,
        *["on_aggregate_start", "on_aggregate_end"],
        *["on_evaluate_start", "on_evaluate_end"],
        "on_round_end",
        *["on_evaluate_start", "on_evaluate_end"],
        "on_fit_end",
    ]


def test_the_cohort_is_a_pure_function_and_absent_clients_are_untouched() -> None:
    """A client's own model stays as it is in a round without the client."""
    recorder = Recorder()
    loop = fake_loop(FELLRec(), num_clients=10, participation={"rate": 0.3}, callbacks=[recorder], num_rounds=2)
    loop.run()
    for record in recorder.records:
        assert tuple(t.row for t in record.trained) == cohort(10, 0.3, 0, record.round_index)
    trained = {t.row for record in recorder.records for t in record.trained}
    for row in set(range(10)) - trained:
        assert loop.population.bank.versions[row] is loop.population.initial
    assert loop.population.local_steps == [
        sum(row == t.row for r in recorder.records for t in r.trained) for row in range(10)
    ]


def test_every_cohort_starts_from_the_servers_model() -> None:
    """FedAvg with 3 of 10 clients a round: client c adds c + 1, weighted by c + 1 samples, to one common model."""
    recorder = Recorder()
    loop = fake_loop(num_clients=10, participation={"rate": 0.3}, callbacks=[recorder], num_rounds=4)
    loop.run()
    expected = 0.0
    for record in recorder.records:
        numbers = [t.row + 1 for t in record.trained]
        assert [float(t.job.adapter.tensors()["a"][0]) for t in record.trained] == pytest.approx([expected] * 3)
        expected += sum(number**2 for number in numbers) / sum(numbers)
    assert [adapter["a"] for adapter in adapters(loop)] == [pytest.approx([expected] * 2)] * 10
    assert len({id(version) for version in loop.population.bank.versions}) == 1, "stored once"


def test_a_client_that_fails_ends_the_run_or_is_left_out() -> None:
    def fails(job: Job) -> bool:
        return job.row == 1 and job.round_index == 1

    with pytest.raises(TrainingError, match="client 1 failed"):
        fake_loop(executor=FakeExecutor(fails)).run()
    recorder = Recorder()
    loop = fake_loop(executor=FakeExecutor(fails), participation={"on_failure": "skip"}, callbacks=[recorder])
    result = loop.run()
    assert [f.row for f in recorder.records[1].failed] == [1]
    assert [t.row for t in recorder.records[1].trained] == [0, 2, 3]
    assert result.failed_clients == {"1": [1]}
    with pytest.raises(TrainingError, match=r"only 3 of 4 clients finished round 1, participation.quorum=0.9 needs 4"):
        fake_loop(executor=FakeExecutor(fails), participation={"on_failure": "skip", "quorum": 0.9}).run()


class TwoModels(FedAvg):
    """A shared and a personal model a client."""

    population = SharedAndPersonal


def test_the_quorum_counts_clients_and_a_client_needs_all_of_its_models() -> None:
    """Rows 0 and 1 are shared, 2 and 3 personal. One complete client of two is enough for a quorum of a half."""

    def some(rows: set[int]) -> Callable[[Job], bool]:
        return lambda job: job.row in rows and job.round_index == 0

    skip = {"on_failure": "skip"}
    for rows in ({0, 1}, {0, 3}):
        with pytest.raises(TrainingError, match="only 0 of 2 clients finished round 0"):
            fake_loop(TwoModels(), FakeExecutor(some(rows)), num_clients=2, participation=skip).run()
    recorder = Recorder()
    loop = fake_loop(TwoModels(), FakeExecutor(some({1})), 2, [recorder], participation=skip, num_rounds=1)
    assert loop.run().failed_clients == {"0": [1]}
    assert [t.row for t in recorder.records[0].trained] == [0, 2], "nothing of a client that is reported as left out"
    assert adapters(loop)[0] == {"a": [1.0, 1.0], "b": [1.0, 1.0]}, "the mean of client 0 alone"


def test_validation_selects_and_the_test_data_are_scored_once() -> None:
    """The metric grows to 12 in round 1 and is negative from then on."""
    executor = FakeExecutor(best=24.0)
    loop = fake_loop(executor=executor, num_rounds=5)
    result = loop.run()
    assert executor.scored == ["val"] * 6 + ["test"]
    assert (result.best_round, result.evaluation.round_index) == (1, 1)
    assert [stored.tensors()["a"].tolist() for stored in result.served] == [[6.0, 6.0]] * 4


def test_each_client_can_keep_its_own_best_round() -> None:
    """Client c adds 4·(c + 1) to its metric a round, which is lost above 8: rounds 1, 0, none better than the start."""
    loop = fake_loop(rule=Local(), executor=FakeExecutor(best=8.0), num_clients=3, select="client", num_rounds=4)
    result = loop.run()
    assert loop.selection.client_rounds == [1, 0, -1]
    assert [stored.tensors()["a"].tolist() for stored in result.served] == [[2.0, 2.0], [2.0, 2.0], [0.0, 0.0]]


def test_patience_and_a_callback_end_the_run_early() -> None:
    loop = fake_loop(executor=FakeExecutor(best=12.0), num_rounds=30, patience=2)
    result = loop.run()
    assert result.num_rounds == result.best_round + 1 + 2 == 3

    class Stop(FederatedCallback):
        def on_round_end(self, record: RoundRecord) -> None:
            if record.round_index == 1:
                self.events.stop()

    assert fake_loop(num_rounds=30, callbacks=[Stop()]).run().num_rounds == 2


def test_evaluations_can_be_rarer_than_rounds() -> None:
    executor = FakeExecutor()
    fake_loop(executor=executor, num_rounds=5, evaluate_every=2).run()
    assert executor.scored == ["val"] * 4 + ["test"], "the start, rounds 2 and 4, and the last one"


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    how = {"num_rounds": 4, "participation": {"rate": 0.5}, "num_clients": 6}
    whole, first = fake_loop(**how), fake_loop(**{**how, "num_rounds": 2})
    expected = whole.run()
    first.run()
    second = resumed(first, tmp_path, **how)
    assert second.progress.round_index == 2
    found = second.run()
    assert adapters(second) == adapters(whole)
    assert found.evaluation.summary == expected.evaluation.summary
    assert second.population.local_steps == whole.population.local_steps
    assert second.exchange.ledger.rows() == whole.exchange.ledger.rows()
    for row in range(6):
        assert second.population.optimizer_of(row).keys() == whole.population.optimizer_of(row).keys()


def test_a_run_stopped_within_a_round_does_not_train_finished_clients_again(tmp_path: Path) -> None:
    class StopAfterTwo(FederatedCallback):
        def on_client_end(self, trained: Trained) -> None:
            if trained.job.round_index == 1 and trained.row == 1:
                raise Preempted("stopped", 75)

    def build(*more: FederatedCallback) -> tuple[object, Checkpoint]:
        loop = fake_loop()
        checkpoint = Checkpoint(tmp_path, {**_parts(loop)}, loop.population)
        loop.events.callbacks += [checkpoint, *more]
        return loop, checkpoint

    first, _ = build(StopAfterTwo())
    with pytest.raises(Preempted):
        first.run()  # type: ignore[attr-defined]
    started = Started()
    second, checkpoint = build(started)
    assert checkpoint.resume() == 1
    second.run()  # type: ignore[attr-defined]
    assert started.jobs[:2] == [(1, 2), (1, 3)], "clients 0 and 1 had finished round 1"
    whole = fake_loop()
    whole.run()
    assert adapters(second) == adapters(whole)  # type: ignore[arg-type]


class Started(FederatedCallback):
    """Keeps which clients trained in which round."""

    def __init__(self) -> None:
        self.jobs: list[tuple[int, int]] = []

    def on_client_start(self, job: Job) -> None:
        self.jobs.append((job.round_index, job.row))


def _parts(loop: object) -> dict[str, object]:
    from fakes import parts

    return parts(loop)  # type: ignore[arg-type]


def test_a_client_without_validation_users_is_tested_with_the_round_that_is_best_for_the_others() -> None:
    class Without(FakeExecutor):
        def score(self, jobs, stage, round_index):  # type: ignore[no-untyped-def]
            found = super().score(jobs, stage, round_index)
            found.per_client["ndcg_at_10"][2] = torch.nan
            return found

    loop = fake_loop(rule=Local(), executor=Without(), num_clients=3, select="client", num_rounds=2)
    result = loop.run()
    assert loop.selection.client_rounds == [1, 1, 1]
    assert [stored.tensors()["a"].tolist() for stored in result.served] == [[2.0, 2.0], [4.0, 4.0], [6.0, 6.0]]


def test_a_client_that_waits_for_another_anchor_trains_again_after_a_resume(tmp_path: Path) -> None:
    """A personal model's training depends on its anchor: the file of a run with another one is not used."""

    def start(folder: Path) -> FederatedLoop:
        loop = fake_loop(TwoModels(), num_clients=2)
        loop.population.persist(folder)
        loop.population.bank.store(0, {name: torch.zeros(2) for name in ("a", "b")})
        loop.population.bank.store(2, {name: torch.zeros(2) for name in ("a", "b")})
        return loop

    loop = start(tmp_path)
    job = loop.population.job(2, 0)
    loop.train([job])
    same, other = start(tmp_path), start(tmp_path)
    assert same.population.recover(same.population.job(2, 0)) is not None
    other.population.bank.store(0, {name: torch.ones(2) for name in ("a", "b")})
    assert other.population.recover(other.population.job(2, 0)) is None


def test_a_nan_adapter_is_named() -> None:
    class Spoiling(FakeExecutor):
        def train(self, jobs, events):  # type: ignore[no-untyped-def]
            for outcome in super().train(jobs, events):
                outcome.adapter.tensors()["b"][0] = torch.nan  # type: ignore[union-attr]
                yield outcome

    with pytest.raises(TrainingError, match="b of client 0 is not finite after local training in round 0"):
        fake_loop(executor=Spoiling()).run()
