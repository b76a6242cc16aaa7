"""How far a run is, on standard error: a bar over its steps, one over the users of an evaluation, and the time left."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import FitResult, FitStart, Job, RoundRecord
from fellrec.terminal import console, duration
from fellrec.types import Evaluation

_WIDE = 110
"""Columns from which on words stand beside the numbers."""
_TITLE = "FELLRec alpha=0.7"
"""Longer titles are cut in a narrow terminal."""


class Series:
    """The runs of one command: which one is going, and how long all that are left may take.

    Args:
        num_runs: Of the command, without those that had finished before.
        clock: Gives the time in seconds.
    """

    def __init__(self, num_runs: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_runs = num_runs
        self.number = 0
        self._clock = clock
        self._started = 0.0
        self._first = 0.0

    def begin(self) -> None:
        """The next run begins; the time counts from the first one's first step."""
        self.number += 1

    def start(self, done: float) -> None:
        """The steps of the current run begin, where a fraction ``done`` of them was taken before."""
        self._first = done
        if self.number <= 1:
            self._started = self._clock()

    def seconds_left(self, done: float) -> float | None:
        """Seconds until the last run is over, at the pace so far; ``None`` if none is known.

        Args:
            done: Fraction of the current run's steps that was taken, in [0, 1].
        """
        made = max(0, self.number - 1) + done - self._first
        left = max(0, self.num_runs - self.number) + 1 - done
        return (self._clock() - self._started) * left / made if made > 0 else None


class RoundProgress(FederatedCallback):
    """Shows how far the run is; without a terminal it writes one line per round.

    Args:
        title: Names the run in lines.
        short_title: Names it beside a bar.
        metric: Validation metric to show.
        series: The runs of the command.
    """

    def __init__(self, title: str, metric: str, short_title: str = "", series: Series | None = None) -> None:
        self.title = title
        self.short_title = short_title or title
        self.metric = metric
        self.series = series or Series()
        self.console = console()
        self._progress: Progress | None = None
        self._evaluation: TaskID | None = None
        self._value = float("nan")

    def on_fit_start(self, fit: FitStart) -> None:
        """Open the bar; its unit is one optimiser step."""
        self._num_rounds, self._num_steps = fit.num_rounds, max(1, fit.num_steps)
        self._done = fit.steps_done
        self.series.start(min(1.0, self._done / self._num_steps))
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20 if self._is_wide else 8),
            TextColumn("{task.fields[count]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(
            self._text(None), total=fit.num_steps, completed=self._done, count=self._count(), left=self._left()
        )
        self._progress.start()

    def on_step_end(self, loss: float) -> None:
        """Advance the bar by one step."""
        assert self._progress is not None
        self._done += 1
        self._progress.update(self._task, advance=1, count=self._count(), left=self._left())

    def on_client_start(self, job: Job) -> None:
        """Show which client trains."""
        assert self._progress is not None
        self._progress.update(self._task, description=self._text(job))

    def on_evaluate_start(self, stage: str) -> None:
        """Show a bar for the evaluation until it is over."""
        assert self._progress is not None
        name = {"val": "validation", "test": "test"}[stage]
        text = f"{self.short_title} · {name}" if self._is_wide else name
        self._evaluation = self._progress.add_task(text, total=None, count="", left="")

    def on_users_scored(self, done: int, total: int) -> None:
        """Advance the bar of the evaluation."""
        if self._progress is not None and self._evaluation is not None:
            count = f"{done}/{total}" + (" users" if self._is_wide else "")
            self._progress.update(self._evaluation, total=total, completed=done, count=count)

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        """Remove the bar of the evaluation, and remember the metric."""
        assert self._progress is not None
        if self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
            self._evaluation = None
        if evaluation.stage == "val":
            self._value = evaluation.summary[f"{self.metric}/mean"]

    def on_round_end(self, record: RoundRecord) -> None:
        """Without a terminal, write one line per round."""
        if not self.console.is_terminal:
            losses = [trained.loss for trained in record.trained]
            run = f"run {self.series.number} of {self.series.num_runs}, " if self.series.num_runs > 1 else ""
            self.console.print(
                f"{run}{self.title}: round {record.round_index + 1}/{self._num_rounds}, "
                f"train loss {sum(losses) / len(losses):.4f}, val {metric_name(self.metric)} {self._value:.4f}, "
                f"{record.seconds:.1f} s{self._left_in_words(', ')}",
                soft_wrap=True,
            )

    def on_fit_end(self, result: FitResult) -> None:
        """Close the bar."""
        self._stop()

    def on_exception(self, error: BaseException) -> None:
        """Close the bar, so that the message stands on a line of its own."""
        self._stop()

    @property
    def _is_wide(self) -> bool:
        return self.console.width >= _WIDE

    def _text(self, job: Job | None) -> str:
        """Run, round, client and metric: with words, or the numbers alone."""
        known = [] if math.isnan(self._value) else [f"{metric_name(self.metric)} {self._value:.4f}"]
        if self._is_wide:
            where = [] if job is None else [f"round {job.round_index + 1}/{self._num_rounds}", f"client {job.client}"]
            return " · ".join([self.short_title, *where, *(f"val {value}" for value in known)])
        where = [] if job is None else [f"r{job.round_index + 1}/{self._num_rounds}", f"c{job.client}"]
        title = self.short_title[: len(_TITLE) - 2 * len(_shown(self.series))]
        return " ".join([*_shown(self.series), title, *where, *known])

    def _count(self) -> str:
        return f"{self._done}/{self._num_steps}" + (" steps" if self._is_wide else "")

    def _left(self) -> str:
        if self._is_wide:
            run = f"run {self.series.number} of {self.series.num_runs}" if self.series.num_runs > 1 else ""
            return run + self._left_in_words(", " if run else "")
        seconds = self.series.seconds_left(min(1.0, self._done / self._num_steps))
        return "" if seconds is None else duration(seconds)

    def _left_in_words(self, before: str) -> str:
        seconds = self.series.seconds_left(min(1.0, self._done / self._num_steps))
        is_last_step = self._done >= self._num_steps and self.series.number >= self.series.num_runs
        return "" if seconds is None or is_last_step else f"{before}about {duration(seconds)} left"

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def metric_name(metric: str) -> str:
    """How tables call a metric.

    Example:
        >>> metric_name("ndcg_at_10"), metric_name("recall_at_5")
        ('NDCG@10', 'Recall@5')
    """
    name, _, cutoff = metric.partition("_at_")
    return f"{'Recall' if name == 'recall' else name.upper()}@{cutoff}"


def _shown(series: Series) -> Sequence[str]:
    """Which run it is, in numbers; nothing if there is one."""
    return [f"{series.number}/{series.num_runs}"] if series.num_runs > 1 else []
