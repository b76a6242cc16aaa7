"""What a run shows: numbers at 80 columns, words at 120, lines without a terminal, nothing with --quiet."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch
from rich.console import Console

from fellrec import terminal
from fellrec.callbacks.progress import RoundProgress, Series
from fellrec.federated.records import NOTHING, Aggregated, FitStart, Job, RoundRecord, Trained
from fellrec.metrics.summary import summarise
from fellrec.types import Evaluation


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def evaluation(stage: str, round_index: int = 0) -> Evaluation:
    return summarise({"ndcg_at_10": torch.tensor([0.25])}, torch.tensor([0]), 1, stage, round_index)


def job(client: int) -> Job:
    return Job(client, client, 0, 0, NOTHING)


def shown(width: int, is_terminal: bool = True, num_runs: int = 4) -> str:
    """The second of four runs, half of its steps taken, 30 seconds after the start of the first; then a validation."""
    clock = Clock()
    series = Series(num_runs, clock)
    callback = RoundProgress("films-FELLRec-s0", "ndcg_at_10", "FELLRec-s0", series)
    file = io.StringIO()
    callback.console = Console(file=file, width=width, force_terminal=is_terminal, color_system=None)
    series.begin()
    series.start(0.0)
    series.begin()
    callback.on_fit_start(FitStart(10, 0, 3, num_steps=200))
    callback.on_evaluate_start("val")
    callback.on_evaluate_end(evaluation("val", -1))
    callback.on_client_start(job(2))
    clock.now += 30
    for _ in range(100):
        callback.on_step_end(0.5)
    callback.on_evaluate_start("val")
    callback.on_users_scored(30, 60)
    assert callback._progress is not None
    callback._progress.refresh()
    both = file.getvalue()
    callback.on_evaluate_end(evaluation("val"))
    trained = Trained(job(2), NOTHING, NOTHING, 0.5, 1, 100, 3.0)
    callback.on_round_end(RoundRecord(0, (trained,), Aggregated({}), None, 3.0))
    callback.on_exception(KeyboardInterrupt())
    return both if is_terminal else file.getvalue()


def test_80_columns_have_the_numbers_without_words() -> None:
    text = shown(80)
    assert "2/4 FELLRec-s0 r1/10 c2 NDCG@10 0.2500" in text
    assert "100/200" in text
    assert "30/60" in text, "the evaluation has a bar of its own"
    assert "50 s" in text, "1.5 runs took 30 s, 2.5 are left"
    assert "steps" not in text
    assert "nan" not in text
    assert all(len(line) <= 80 for line in text.replace("\r", "\n").split("\n") if "\x1b" not in line)


def test_120_columns_have_words() -> None:
    text = shown(120)
    assert "FELLRec-s0 · round 1/10 · client 2 · val NDCG@10 0.2500" in text
    assert "100/200 steps" in text
    assert "run 2 of 4, about 50 s left" in text
    assert "FELLRec-s0 · validation" in text
    assert "30/60 users" in text


def test_without_a_terminal_a_round_is_one_plain_line() -> None:
    (line,) = shown(80, is_terminal=False).strip().splitlines()
    expected = "films-FELLRec-s0: round 1/10, train loss 0.5000, val NDCG@10 0.2500, 3.0 s, about 50 s left"
    assert line == f"run 2 of 4, {expected}"
    assert "run " not in shown(80, is_terminal=False, num_runs=1)


@pytest.fixture
def quiet() -> Iterator[None]:
    terminal.be_quiet(True)
    yield
    terminal.be_quiet(False)


def test_a_quiet_command_shows_nothing(quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    callback = RoundProgress("films-FELLRec-s0", "ndcg_at_10")
    callback.on_fit_start(FitStart(10, 0, 3, num_steps=200))
    callback.on_client_start(job(0))
    trained = Trained(job(0), NOTHING, NOTHING, 0.5, 1, 100, 3.0)
    callback.on_round_end(RoundRecord(0, (trained,), Aggregated({}), None, 3.0))
    callback.on_exception(KeyboardInterrupt())
    terminal.tell("something")
    assert capsys.readouterr() == ("", "")


def test_a_resumed_run_is_timed_from_where_it_continues() -> None:
    """Half of it was done before: a quarter in 10 s, and a quarter is left."""
    clock = Clock()
    series = Series(clock=clock)
    series.begin()
    series.start(0.5)
    assert series.seconds_left(0.5) is None
    clock.now += 10
    assert series.seconds_left(0.75) == pytest.approx(10.0)
