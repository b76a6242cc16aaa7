"""Who takes part in a round, and the simulated clock: laws, edge cases, and what is refused."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeExecutor, adapters, fake_loop, resumed
from scipy.stats import chisquare

from fellrec.aggregation import Uniform
from fellrec.errors import CheckpointError, ConfigError, DataError, TrainingError
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.participation import Clients, Participation
from fellrec.federated.records import Cohort, RoundRecord
from fellrec.federated.samplers import BySizeSampler, PoissonSampler, PowerOfChoiceSampler, Sampler, TraceSampler
from fellrec.federated.settings import ParticipationSettings, PowerOfChoiceSamplerSettings, TraceSamplerSettings
from fellrec.functional.participation import cohort, draw_by_weight, slowdowns


class Recorder(FederatedCallback):
    """Keeps who was drawn in each round."""

    def __init__(self) -> None:
        self.cohorts: list[Cohort] = []

    def on_round_end(self, record: RoundRecord) -> None:
        assert record.cohort is not None
        self.cohorts.append(record.cohort)


def participation(num_clients: int, sampler: Sampler | None = None, **how: Any) -> Participation:
    """Client c has c + 1 training targets and takes one step."""
    settings = ParticipationSettings(**how)
    clients = Clients(settings, 0, range(1, num_clients + 1), [1] * num_clients)
    return Participation(settings, 0, clients, sampler)


def cohorts(num_rounds: int, num_clients: int, sampler: Sampler | None = None, **how: Any) -> list[Cohort]:
    recorder = Recorder()
    fake_loop(
        Uniform(), num_clients=num_clients, participation=how, sampler=sampler, callbacks=[recorder],
        num_rounds=num_rounds,
    ).run()  # fmt: skip
    return recorder.cohorts


def trace(path: Path, *lines: str, **settings: Any) -> TraceSampler:
    path.write_text("\n".join(["client,start,end", *lines]) + "\n")
    return TraceSampler(TraceSamplerSettings(path=str(path), **settings))


def test_drawing_by_weight_has_the_probabilities_of_successive_draws() -> None:
    """P(i, then j) = w_i · w_j / (1 − w_i), for weights that sum to 1."""
    weights = np.array([0.5, 0.3, 0.2])
    generator = np.random.default_rng(0)
    found = Counter(tuple(draw_by_weight(weights, 2, generator).tolist()) for _ in range(6000))
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    expected = [6000 * weights[i] * weights[j] / (1 - weights[i]) for i, j in pairs]
    assert chisquare([found[pair] for pair in pairs], expected).pvalue > 0.01


def test_drawing_by_weight_takes_those_without_weight_last() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        assert set(draw_by_weight(np.array([0.0, 2.0, 0.0, 1.0]), 3, generator).tolist()) >= {1, 3}
    assert sorted(draw_by_weight(np.zeros(3), 3, generator).tolist()) == [0, 1, 2]


def test_large_clients_are_drawn_more_often() -> None:
    """Client c of 4 has c + 1 targets: alone it is drawn with probability (c + 1) / 10."""
    loop = fake_loop(Uniform(), num_clients=4, participation={"rate": 0.25}, sampler=BySizeSampler())
    found = Counter(row for number in range(2000) for row in loop.participation.draw(loop.population, number).rows)
    assert chisquare([found[client] for client in range(4)], [200, 400, 600, 800]).pvalue > 0.01


def test_slowdowns_are_log_uniform_between_1_and_the_largest() -> None:
    found = np.log(slowdowns(4000, 16.0, seed=3)) / math.log(16.0)
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert chisquare(np.histogram(found, bins=10, range=(0, 1))[0]).pvalue > 0.01


def test_the_clock_adds_the_slowest_client_of_each_round() -> None:
    slow = slowdowns(6, 8.0, seed=0)
    expected = 0.0
    for found in cohorts(4, 6, rate=0.5, slowdown=8.0, step_seconds=2.0):
        assert found.rows == cohort(6, 0.5, 0, found.round_index), "the cohort is that of a run without slow clients"
        expected += 2.0 * max(slow[list(found.rows)])
        assert found.seconds == pytest.approx(expected)
        assert found.metrics["participation/simulated_seconds"] == found.seconds


def test_over_selection_keeps_the_first_to_finish() -> None:
    slow = slowdowns(10, 8.0, seed=0)
    for found in cohorts(5, 10, rate=0.3, slowdown=8.0, over_selection=2.0):
        drawn = cohort(10, 0.6, 0, found.round_index)
        first = sorted(sorted(drawn, key=lambda client: slow[client])[:3])
        assert (list(found.rows), sorted([*found.rows, *found.late])) == (first, list(drawn))


def test_all_clients_are_drawn_at_most() -> None:
    assert cohorts(1, 3, rate=1.0, over_selection=5.0)[0].rows == (0, 1, 2)


def test_clients_drop_out_with_the_given_probability_are_not_trained_and_are_reported() -> None:
    recorder = Recorder()
    how: dict[str, Any] = {"dropout": 0.3, "quorum": 0.01}
    loop = fake_loop(Uniform(), num_clients=40, participation=how, callbacks=[recorder], num_rounds=30)
    result = loop.run()
    dropped = [len(found.dropped) for found in recorder.cohorts]
    assert 0.25 < sum(dropped) / (30 * 40) < 0.35
    assert all(sorted([*found.rows, *found.dropped]) == list(range(40)) for found in recorder.cohorts)
    assert loop.population.local_steps == [sum(c in found.rows for found in recorder.cohorts) for c in range(40)]
    assert result.failed_clients == {str(f.round_index): list(f.dropped) for f in recorder.cohorts if f.dropped}


def test_a_run_whose_dropouts_leave_too_few_clients_is_refused_before_it_starts() -> None:
    made = participation(4, dropout=0.5, quorum=1.0)
    with pytest.raises(ConfigError, match=r"round 0 has \d clients \(\d of 4 drop out\) and needs 4: lower participa"):
        made.check(num_rounds=5)
    participation(4, dropout=0.5, quorum=0.01, over_selection=1.0).check(num_rounds=1)
    with pytest.raises(ConfigError, match="round 0 has 2 clients and needs 3"):
        participation(4, rate=0.5).check(num_rounds=1, least_clients=3)


def test_failures_and_dropouts_count_together_for_the_quorum() -> None:
    """Of 10 clients some drop out; all others but one fail."""
    drops = cohorts(1, 10, dropout=0.3, quorum=0.1)[0]
    survivor = drops.rows[0]
    executor = FakeExecutor(lambda job: job.row != survivor)
    how = {"dropout": 0.3, "on_failure": "skip"}
    fake_loop(Uniform(), executor, 10, participation={**how, "quorum": 0.1}, num_rounds=1).run()
    with pytest.raises(TrainingError, match=rf"only 1 of 10 clients finished.*{len(drops.dropped)} clients dropped"):
        fake_loop(Uniform(), executor, 10, participation={**how, "quorum": 0.2}, num_rounds=1).run()


def test_a_trace_says_who_is_available_and_a_round_waits_for_its_quorum(tmp_path: Path) -> None:
    """Rounds take 1 second. Of 4 clients 2 are needed: at 0 only client 0 is there, at 3 clients 1 and 2 come."""
    sampler = trace(tmp_path / "t.csv", "0,0,100", "1,3,5", "2,3,5", "3,7,100")
    found = cohorts(4, 4, sampler, rate=1.0, quorum=0.5)
    assert [(cohort.begun, cohort.rows) for cohort in found] == [
        (3.0, (0, 1, 2)),
        (4.0, (0, 1, 2)),
        (7.0, (0, 3)),
        (8.0, (0, 3)),
    ]


def test_a_trace_begins_again_after_its_period(tmp_path: Path) -> None:
    """Rounds take 1 second, and windows are 2 seconds long: two rounds in each, client after client."""
    sampler = trace(tmp_path / "t.csv", "0,0,2", "1,5,7", period=10)
    found = cohorts(6, 2, sampler, quorum=0.5)
    begun = [(cohort.begun, cohort.rows) for cohort in found]
    assert begun == [(0, (0,)), (1, (0,)), (5, (1,)), (6, (1,)), (10, (0,)), (11, (0,))]


@pytest.mark.parametrize("period", [0.1, 0.7, 1 / 3, 86400.0])
def test_every_change_of_a_periodic_trace_is_later_and_reached(tmp_path: Path, period: float) -> None:
    sampler = trace(tmp_path / "t.csv", f"0,{period * 0.3},{period * 0.4}", period=period)
    now = 0.0
    for number in range(2000):
        now = next(t for t in sampler.changes(now) if sampler.available(1, t)[0])
        assert now == pytest.approx((number + 0.3) * period, rel=1e-9)


def test_a_trace_without_enough_clients_is_refused_before_training(tmp_path: Path) -> None:
    sampler = trace(tmp_path / "t.csv", "0,0,1", "1,4,5")
    with pytest.raises(ConfigError, match="round 0 needs 2 clients, and from 0 simulated seconds on at most 1 are"):
        participation(2, sampler, quorum=1.0).check(1)
    with pytest.raises(ConfigError, match="round 2 needs 1 clients, and from 5 simulated seconds on at most 0"):
        participation(2, sampler).check(3)
    participation(2, sampler).check(2)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["0,0"], r":2 has 2 fields instead of 3"),
        (["a,0,1"], r":2: a,0,1 is not a client's number and two times"),
        (["0,0,1", "0,x,1"], r":3: 0,x,1 is not a client's number and two times"),
        (["-1,0,1"], r":2: -1,0,1 is not allowed: a client from 0, and 0 <= start < end"),
        (["0,2,1"], r"0 <= start < end"),
        (["0,nan,1"], r"0 <= start < end"),
        (["0,0,inf"], r"0 <= start < end"),
        ([], "has no lines: no client would ever be available"),
    ],
)
def test_malformed_traces_are_refused(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        trace(tmp_path / "t.csv", *lines)


def test_other_traces_are_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "t.csv"
    with pytest.raises(DataError, match=r"at most participation.sampler.period=5"):
        trace(path, "0,0,6", period=5)
    with pytest.raises(ConfigError, match="names the clients 4, 7: there are 4, from 0 to 3"):
        participation(4, trace(path, "0,0,1", "7,0,1", "4,0,1"))
    participation(3, trace(path, "1,0,1"))
    assert "has no line for the clients 0, 2: they never take part" in caplog.text
    path.write_text("client,begin,end\n0,1,2\n")
    with pytest.raises(DataError, match="has the columns client, begin, end; needed are client, start, end"):
        TraceSampler(TraceSamplerSettings(path=str(path)))
    with pytest.raises(DataError, match="none.csv"):
        TraceSampler(TraceSamplerSettings(path=str(tmp_path / "none.csv")))


def test_a_run_resumed_with_another_trace_is_refused(tmp_path: Path) -> None:
    how: dict[str, Any] = {"num_clients": 2, "num_rounds": 2}
    loop = fake_loop(Uniform(), sampler=trace(tmp_path / "a.csv", "0,0,9", "1,0,9"), **how)
    loop.run_round(0)
    with pytest.raises(CheckpointError, match=r"participation.sampler.path is another file"):
        resumed(loop, tmp_path / "c", rule=Uniform(), sampler=trace(tmp_path / "b.csv", "0,0,8", "1,0,9"), **how)


@pytest.mark.parametrize("kind", ["uniform", "by_size", "trace", "power_of_choice"])
def test_a_resumed_run_has_the_cohorts_of_an_uninterrupted_one(tmp_path: Path, kind: str) -> None:
    def sampler() -> Sampler | None:
        return {
            "by_size": BySizeSampler,
            "power_of_choice": lambda: PowerOfChoiceSampler(PowerOfChoiceSamplerSettings()),
            "trace": lambda: trace(tmp_path / "t.csv", *(f"{c},{c},{c + 9}" for c in range(8)), period=20),
            "uniform": lambda: None,
        }[kind]()

    participation = {"rate": 0.5, "slowdown": 4.0, "dropout": 0.2, "over_selection": 1.5, "quorum": 0.25}
    how: dict[str, Any] = {"num_clients": 8, "num_rounds": 6, "participation": participation}
    whole, recorder = fake_loop(Uniform(), sampler=sampler(), **how), Recorder()
    whole.events.callbacks.append(recorder)
    whole.run()
    first = fake_loop(Uniform(), sampler=sampler(), **{**how, "num_rounds": 3})
    first.run()
    second, again = resumed(first, tmp_path / "c", rule=Uniform(), sampler=sampler(), **how), Recorder()
    second.events.callbacks.append(again)
    second.run()
    assert again.cohorts == recorder.cohorts[3:]
    assert adapters(second) == adapters(whole)


class Losses(FakeExecutor):
    """Clients whose loss at the received model is given; NaN where a client failed."""

    def __init__(self, losses: dict[int, float]) -> None:
        super().__init__()
        self.losses = losses
        self.measured: list[int] = []

    def measure(self, jobs: Any) -> Any:
        self.measured += [job.row for job in jobs]
        return [(self.losses[job.row],) for job in jobs]


def test_power_of_choice_takes_the_candidates_with_the_largest_loss() -> None:
    """Cho et al.: of d candidates drawn by size, the m with the largest loss; of equal ones the first."""
    executor = Losses({0: 3.0, 1: 5.0, 2: 1.0, 3: 5.0, 4: 5.0, 5: math.nan})
    recorder = Recorder()
    sampler = PowerOfChoiceSampler(PowerOfChoiceSamplerSettings(num_candidates=6))
    how: dict[str, Any] = {"participation": {"rate": 1 / 3}, "sampler": sampler, "callbacks": [recorder]}
    loop = fake_loop(Uniform(), executor, 6, num_rounds=1, **how)
    loop.run()
    assert recorder.cohorts[0].rows == (1, 3)
    assert recorder.cohorts[0].measured == tuple(executor.measured) == (0, 1, 2, 3, 4, 5)
    assert loop.population.local_steps == [0, 1, 0, 1, 0, 0], "measuring takes no step"
    down = {row[0]: row[6] for row in loop.exchange.ledger.rows() if row[3] == "down"}
    assert down == {0: 16, 1: 32, 2: 16, 3: 32, 4: 16, 5: 16}, "candidates receive the model, of 4 float32"


def test_power_of_choice_with_as_many_candidates_as_needed_is_by_size() -> None:
    sampler = PowerOfChoiceSampler(PowerOfChoiceSamplerSettings(num_candidates=2))
    expected = [found.rows for found in cohorts(5, 8, BySizeSampler(), rate=0.25)]
    assert [found.rows for found in cohorts(5, 8, sampler, rate=0.25)] == expected


@pytest.mark.parametrize("number", [1, 7])
def test_candidates_outside_of_the_population_are_refused(number: int) -> None:
    sampler = PowerOfChoiceSampler(PowerOfChoiceSamplerSettings(num_candidates=number))
    with pytest.raises(ConfigError, match=rf"num_candidates={number} is not allowed: a whole number from 2.* to 6"):
        participation(6, sampler, rate=1 / 3)


def test_a_candidate_that_could_not_measure_is_chosen_last() -> None:
    executor = Losses({0: 1.0, 1: math.nan, 2: 2.0})
    sampler = PowerOfChoiceSampler(PowerOfChoiceSamplerSettings(num_candidates=3))
    recorder = Recorder()
    how: dict[str, Any] = {"participation": {"rate": 0.3}, "callbacks": [recorder]}
    fake_loop(Uniform(), executor, 3, sampler=sampler, num_rounds=1, **how).run()
    assert recorder.cohorts[0].rows == (2,)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"slowdown": 0.5}, "participation.slowdown=0.5 is not allowed: a number of at least 1"),
        ({"dropout": 1.0}, r"participation.dropout=1.0 is not allowed: a number in \[0, 1\)"),
        ({"over_selection": 0.9}, "participation.over_selection=0.9 is not allowed: a number of at least 1"),
        ({"step_seconds": 0}, "participation.step_seconds=0 is not allowed: a number above 0"),
        ({"rate": 0}, r"participation.rate=0 is not allowed: a number in \(0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParticipationSettings(**how)


def test_poisson_cohorts_are_independent_draws_and_nobody_is_left_out_for_being_slow() -> None:
    """The size is binomial, each client comes with the same frequency, and pairs are independent."""
    num, rate, rounds = 20, 0.5, 400
    drawn = np.zeros((rounds, num))
    for cohort_ in cohorts(rounds, num, PoissonSampler(), rate=rate, slowdown=5.0):
        drawn[cohort_.round_index, list(cohort_.rows)] = 1
    sizes = drawn.sum(axis=1)
    assert abs(sizes.mean() - num * rate) < 4 * math.sqrt(num * rate * (1 - rate) / rounds)
    assert 0.8 < sizes.var() / (num * rate * (1 - rate)) < 1.25
    assert np.all(np.abs(drawn.mean(axis=0) - rate) < 4.5 * math.sqrt(rate * (1 - rate) / rounds))


def test_a_poisson_round_without_clients_is_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"round \d+ has 0 clients and needs 1"):
        participation(2, PoissonSampler(), rate=0.5).check(50)
    participation(40, PoissonSampler(), rate=0.5).check(50)
