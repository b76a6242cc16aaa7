"""Asynchronous rounds: the schedule against an event list made by hand, laws, and resumes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeExecutor, adapters, fake_loop, resumed
from test_participation import Recorder, trace

from fellrec.aggregation import FedAsync, FedBuff, Uniform
from fellrec.errors import ConfigError
from fellrec.federated.arrivals import Arrivals
from fellrec.federated.participation import Clients
from fellrec.federated.population import Population
from fellrec.federated.records import Cohort, Job
from fellrec.federated.samplers import PowerOfChoiceSampler, Sampler
from fellrec.federated.settings import ParticipationSettings, PowerOfChoiceSamplerSettings

NOBODY: Population = None  # type: ignore[assignment]


def arrivals(seconds: Sequence[float], buffer_size: int, sampler: Sampler | None = None, **how: Any) -> Arrivals:
    """Clients whose training takes the given times."""
    settings = ParticipationSettings(**how)
    clients = Clients(settings, 0, [1] * len(seconds), [1] * len(seconds))
    clients.seconds = np.array(seconds, dtype=float) * settings.step_seconds
    return Arrivals(settings, 0, clients, sampler, buffer_size)


def rounds(made: Arrivals, number: int) -> list[Cohort]:
    return [made.draw(NOBODY, round_index) for round_index in range(number)]


def test_the_schedule_of_three_clients_by_hand() -> None:
    """Clients take 2, 3 and 5 seconds, all train at the same time, and each update changes the model.

    Ends: client 0 at 2, 4, 6; client 1 at 3, 6; client 2 at 5. Versions: 1 at 2, 2 at 3, 3 at 4, 4 at 5, then both
    updates of 6. Received: 0 starts from 0, 1 (at 2), 3 (at 4); 1 from 0, 2 (at 3); 2 from 0.
    """
    found = rounds(arrivals([2, 3, 5], 1), 6)
    assert [(c.seconds, c.rows, c.start_rounds) for c in found] == [
        (2.0, (0,), (0,)),
        (3.0, (1,), (0,)),
        (4.0, (0,), (1,)),
        (5.0, (2,), (0,)),
        (6.0, (0,), (3,)),
        (6.0, (1,), (2,)),
    ]
    assert [c.metrics["participation/staleness_max"] for c in found] == [0, 1, 1, 3, 1, 3]
    assert [c.oldest for c in found] == [0, 0, 0, 2, 2, 4], "the oldest version that somebody still trains from"


def test_a_buffer_of_two_by_hand() -> None:
    """The same clients; those with an update in the buffer wait for the next version.

    At 2 client 0 arrives and waits; at 3 client 1: version 1, and both begin. At 5 clients 0 and 2 arrive together:
    version 2, and both begin. Client 1 arrives at 6 and waits, client 0 at 7: version 3.
    """
    found = rounds(arrivals([2, 3, 5], 2), 3)
    assert [(c.seconds, c.rows, c.start_rounds) for c in found] == [
        (3.0, (0, 1), (0, 0)),
        (5.0, (0, 2), (1, 0)),
        (7.0, (0, 1), (2, 1)),
    ]


def test_with_everybody_in_the_buffer_nothing_is_stale_however_slow_clients_are() -> None:
    for number, found in enumerate(rounds(arrivals([1, 7, 3, 2.5], 4), 5)):
        assert (found.rows, found.start_rounds) == ((0, 1, 2, 3), (number,) * 4)
        assert found.seconds == 7.0 * (number + 1)


def test_without_slow_clients_a_buffer_of_all_that_train_is_never_stale() -> None:
    made = arrivals([2.0] * 9, 3, rate=1 / 3)
    for found in rounds(made, 20):
        assert set(found.start_rounds) == {found.round_index}
        assert len(set(found.rows)) == 3
        assert found.seconds == 2.0 * (found.round_index + 1)


@pytest.mark.parametrize("buffer_size", [1, 2, 5, 9])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_laws_of_every_schedule(buffer_size: int, dropout: float) -> None:
    """Rounds are full, without a client twice; a client's versions rise, and it is never faster than its clock."""
    seconds = np.random.default_rng(1).uniform(0.5, 6, size=9)
    found = rounds(arrivals(seconds.tolist(), buffer_size, rate=0.6, dropout=dropout), 60)
    begun_at = [0.0, *(cohort.seconds for cohort in found)]
    last: dict[int, int] = {}
    kept = 0
    for number, cohort in enumerate(found):
        assert len(set(cohort.rows)) == buffer_size
        assert list(cohort.rows) == sorted(cohort.rows)
        assert cohort.seconds >= cohort.begun == begun_at[number]
        assert min(cohort.start_rounds) >= kept, "no version is needed after it was dropped"
        kept = max(kept, cohort.oldest)
        for row, start in zip(cohort.rows, cohort.start_rounds, strict=True):
            assert last.get(row, -1) < start <= number
            assert cohort.seconds - begun_at[start] >= seconds[row] - 1e-9
            last[row] = start
    assert bool(dropout) == any(cohort.dropped for cohort in found)


def test_the_schedule_does_not_depend_on_how_it_is_asked_for() -> None:
    how: dict[str, Any] = {"rate": 0.5, "dropout": 0.2}
    expected = rounds(arrivals([1, 2, 3, 4, 5, 6], 2, **how), 12)
    assert arrivals([1, 2, 3, 4, 5, 6], 2, **how).draw(NOBODY, 11) == expected[11]


def test_fast_clients_arrive_more_often() -> None:
    """Two of two clients train; one is four times as fast."""
    found = [c.rows[0] for c in rounds(arrivals([1, 4], 1), 100)]
    assert found.count(0) == 80


def test_a_trace_delays_clients(tmp_path: Path) -> None:
    """Client 0 (1 second) is there from 0 to 2 and begins at 0 and 1; client 1 (2 seconds) from 5 on; client 2 never.

    Client 0's second update is at 2, where it is gone; client 1 begins at 5 and 7.
    """
    sampler = trace(tmp_path / "t.csv", "0,0,2", "1,5,100")
    found = rounds(arrivals([1, 2, 1], 1, sampler), 4)
    assert [(c.seconds, c.rows) for c in found] == [(1.0, (0,)), (2.0, (0,)), (7.0, (1,)), (9.0, (1,))]


def test_clients_that_become_available_while_others_train_begin_then(tmp_path: Path) -> None:
    sampler = trace(tmp_path / "t.csv", "0,0,100", "1,3,100")
    found = rounds(arrivals([10, 2], 1, sampler), 2)
    assert [(c.seconds, c.rows) for c in found] == [(5.0, (1,)), (7.0, (1,))]


def test_runs_that_would_wait_for_ever_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="aggregation.buffer_size=4 is not allowed: there are 3 clients"):
        arrivals([1, 1, 1], 4)
    with pytest.raises(ConfigError, match="choose another participation"):
        arrivals([1, 1], 1, PowerOfChoiceSampler(PowerOfChoiceSamplerSettings()))
    sampler = trace(tmp_path / "t.csv", "0,0,100", "1,0,2")
    made = arrivals([1, 1, 1], 2, sampler)
    made.check(2)
    with pytest.raises(
        ConfigError, match="round 2 needs 2 updates and has 1, but from 3 simulated seconds on no other"
    ):
        made.check(3)


def mean_of_updates(rule: Any, **how: Any) -> list[dict[str, list[float]]]:
    loop = fake_loop(rule, num_clients=4, num_rounds=5, **how)
    loop.run()
    return adapters(loop)


def test_fedbuff_with_everybody_in_the_buffer_is_the_plain_mean() -> None:
    """K = N: nothing is stale, and the model moves by the mean of all updates, also if some clients are slow."""
    expected = mean_of_updates(Uniform())
    assert mean_of_updates(FedBuff(buffer_size=4)) == expected
    assert mean_of_updates(FedBuff(buffer_size=4), participation={"slowdown": 9.0}) == expected


class Remember(FakeExecutor):
    """Keeps the jobs."""

    def __init__(self) -> None:
        super().__init__()
        self.jobs: list[Job] = []

    def train(self, jobs: Sequence[Job], events: Any) -> Any:
        self.jobs += jobs
        yield from super().train(jobs, events)


SLOW: dict[str, Any] = {"num_clients": 6, "participation": {"slowdown": 16.0, "rate": 0.7, "dropout": 0.2}}


@pytest.mark.parametrize("make", [lambda: FedBuff(buffer_size=2), lambda: FedAsync(staleness="hinge", tolerance=1)])
def test_clients_train_from_the_version_that_they_received(make: Any) -> None:
    """The models of all rounds by the rule's equation, in NumPy; a client adds its number + 1 to what it received."""
    rule, executor, recorder = make(), Remember(), Recorder()
    loop = fake_loop(rule, executor, num_rounds=25, callbacks=[recorder], **SLOW)
    loop.run()
    versions = [0.0]
    for cohort in recorder.cohorts:
        delays = [cohort.round_index - start for start in cohort.start_rounds]
        received = [versions[start] for start in cohort.start_rounds]
        w = versions[-1]
        if isinstance(rule, FedBuff):
            w += np.mean([(row + 1) / np.sqrt(1 + d) for row, d in zip(cohort.rows, delays, strict=True)])
        else:
            a = 0.6 * (1 if delays[0] <= 1 else 1 / (10 * (delays[0] - 1) + 1))
            w = (1 - a) * w + a * (received[0] + cohort.rows[0] + 1)
        versions.append(float(w))
        jobs = [job for job in executor.jobs if (job.row, job.round_index) in zip(cohort.rows, cohort.start_rounds)]
        assert [float(job.adapter.tensors()["a"][0]) for job in jobs] == pytest.approx(received, rel=1e-5)
    assert max(max(c.round_index - s for s in c.start_rounds) for c in recorder.cohorts) > 3
    assert adapters(loop)[0]["a"] == pytest.approx([versions[-1]] * 2, rel=1e-5)
    assert len({(job.row, job.round_index) for job in executor.jobs}) == len(executor.jobs)


@pytest.mark.parametrize("stop", [1, 7, 12])
@pytest.mark.parametrize("make", [lambda: FedBuff(buffer_size=2), FedAsync])
def test_a_resume_equals_an_uninterrupted_run_bit_for_bit(tmp_path: Path, make: Any, stop: int) -> None:
    whole, first = fake_loop(make(), num_rounds=16, **SLOW), fake_loop(make(), num_rounds=stop, **SLOW)
    expected = whole.run()
    first.run()
    second = resumed(first, tmp_path, rule=make(), num_rounds=16, **SLOW)
    found = second.run()
    assert adapters(second) == adapters(whole)
    assert found.evaluation.summary == expected.evaluation.summary
    assert found.failed_clients == expected.failed_clients
    assert second.population.local_steps == whole.population.local_steps
    assert second.exchange.ledger.rows() == whole.exchange.ledger.rows()


def test_only_versions_that_are_in_use_are_kept() -> None:
    loop = fake_loop(FedAsync(), num_rounds=40, **SLOW)
    loop.run()
    number = len(loop.population.state_dict()["versions"])
    assert number <= max(40 - loop.participation.draw(loop.population, 39).oldest, 1)


def test_the_bytes_of_late_updates_count_in_the_round_of_their_arrival() -> None:
    class Costs(Recorder):
        bytes: list[float] = []

        def on_round_end(self, record: Any) -> None:
            self.bytes.append(record.costs["cost/train/up_bytes"])

    costs = Costs()
    fake_loop(FedBuff(buffer_size=2), num_rounds=10, callbacks=[costs], **SLOW).run()
    assert costs.bytes == [2 * (16 + 2 * 8)] * 10, "two adapters of 4 float32, with two numbers each"


def test_a_client_that_fails_is_left_out() -> None:
    """The mean is then over those that finished."""
    executor = FakeExecutor(lambda job: job.row == 1)
    how: dict[str, Any] = {"participation": {"on_failure": "skip"}, "num_clients": 2, "num_rounds": 3}
    loop = fake_loop(FedBuff(buffer_size=2), executor, **how)
    assert loop.run().failed_clients == {"0": [1], "1": [1], "2": [1]}
    assert adapters(loop)[0]["a"] == [3.0, 3.0]
    assert torch.equal(loop.population.bank.versions[1].tensors()["a"], loop.population.bank.versions[0].tensors()["a"])
