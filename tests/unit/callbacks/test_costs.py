"""What rounds cost, over a run that is interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
from fakes import fake_loop, parts

from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.callbacks.costs import CostMeter
from fellrec.errors import Preempted
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.records import RoundRecord, Trained
from fellrec.report.costs import Storage


class Stop(FederatedCallback):
    """Ends the run when a client has trained."""

    def __init__(self, round_index: int, row: int) -> None:
        self.at = round_index, row

    def on_client_end(self, trained: Trained) -> None:
        if (trained.job.round_index, trained.row) == self.at:
            raise Preempted("stopped", 75)


class Seconds(FederatedCallback):
    """Keeps how long rounds took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_round_end(self, record: RoundRecord) -> None:
        self.seconds.append(record.seconds)


def run_of(folder: Path, *more: FederatedCallback) -> tuple[FederatedLoop, CostMeter, Checkpoint]:
    loop = fake_loop(num_rounds=4)
    meter = CostMeter("none", lambda: Storage(1, 0), loop.exchange.ledger)
    checkpoint = Checkpoint(folder, {**parts(loop), "costs": meter}, loop.population)
    for callback in (*more, meter, checkpoint):
        callback.events = loop.events
        loop.events.callbacks.append(callback)
    return loop, meter, checkpoint


def test_measurements_go_on_after_a_resume_and_leave_out_the_interrupted_round(tmp_path: Path) -> None:
    before, after = Seconds(), Seconds()
    loop, meter, _ = run_of(tmp_path, before, Stop(2, 1))
    with pytest.raises(Preempted):
        loop.run()
    interrupted_after = meter.total_seconds
    loop, meter, checkpoint = run_of(tmp_path, after)
    assert checkpoint.resume() == 2
    assert meter.rounds.round_seconds == tuple(before.seconds), "of the first two rounds"
    loop.run()
    assert len(after.seconds) == 2
    assert meter.rounds.round_seconds == (*before.seconds, after.seconds[1])
    assert meter.seconds_per_round == pytest.approx(sum((*before.seconds, after.seconds[1])) / 3)
    assert meter.total_seconds > interrupted_after * 0.5 + sum(after.seconds)
    assert meter.cost is not None
    assert meter.cost.num_rounds == 4, "all rounds' traffic is known"


def test_a_finished_run_that_is_resumed_keeps_its_measurements(tmp_path: Path) -> None:
    loop, meter, _ = run_of(tmp_path)
    loop.run()
    again, other, checkpoint = run_of(tmp_path)
    checkpoint.resume()
    again.run()
    assert other.rounds == meter.rounds
    assert other.seconds_per_round == meter.seconds_per_round > 0


def test_without_a_measured_round_there_is_no_time_of_a_round(tmp_path: Path) -> None:
    _, meter, _ = run_of(tmp_path)
    assert meter.seconds_per_round is None
