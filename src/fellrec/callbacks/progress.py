"""A progress bar over rounds, on standard error, with the last loss and validation metric and the time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import FitResult, FitStart, Job, RoundRecord
from fellrec.types import Evaluation


class RoundProgress(FederatedCallback):
    """Shows how far the run is; without a terminal it writes one line per round.

    Args:
        title: Shown before the bar, such as the rule's name.
        metric: Validation metric to show.
    """

    def __init__(self, title: str, metric: str) -> None:
        self.title = title
        self.metric = metric
        self.console = Console(stderr=True, markup=False, emoji=False)
        self._progress: Progress | None = None
        self._value = float("nan")

    def on_fit_start(self, fit: FitStart) -> None:
        """Open the bar; its unit is one optimiser step."""
        self._num_rounds = fit.num_rounds
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task = self._progress.add_task(self.title, total=fit.num_steps, completed=fit.steps_done)
        self._progress.start()

    def on_step_end(self, loss: float) -> None:
        """Advance the bar by one step."""
        assert self._progress is not None
        self._progress.advance(self._task)

    def on_client_start(self, job: Job) -> None:
        """Show which client trains."""
        assert self._progress is not None
        where = f"round {job.round_index + 1}/{self._num_rounds} · client {job.client}"
        text = f"{self.title} · {where} · val {self._value:.4f}"
        self._progress.update(self._task, description=text)

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        """Remember the metric for the bar."""
        if evaluation.stage == "val":
            self._value = evaluation.summary[f"{self.metric}/mean"]

    def on_round_end(self, record: RoundRecord) -> None:
        """Without a terminal, write one line per round."""
        if not self.console.is_terminal:
            losses = [trained.loss for trained in record.trained]
            self.console.print(
                f"{self.title}: round {record.round_index + 1}/{self._num_rounds}, "
                f"train loss {sum(losses) / len(losses):.4f}, val {self.metric} {self._value:.4f}, "
                f"{record.seconds:.1f} s",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def on_fit_end(self, result: FitResult) -> None:
        """Close the bar."""
        self._stop()

    def on_exception(self, error: BaseException) -> None:
        """Close the bar, so that the message stands on a line of its own."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
