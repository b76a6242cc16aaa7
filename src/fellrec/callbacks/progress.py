"""A progress bar over rounds, on standard error, with the last loss and validation metric and the time left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fellrec.federated.callback import FederatedCallback
from fellrec.types import Evaluation, RoundRecord

if TYPE_CHECKING:
    from fellrec.federated.loop import FederatedLoop


class RoundProgress(FederatedCallback):
    """Shows how far the run is; without a terminal it writes one line per round.

    Args:
        title: Shown before the bar, such as the rule's name.
        metric: Validation metric to show.
    """

    def __init__(self, title: str, metric: str) -> None:
        self.title = title
        self.metric = metric
        self.console = Console(stderr=True)
        self._progress: Progress | None = None
        self._value = float("nan")

    def on_fit_start(self, loop: FederatedLoop) -> None:
        """Open the bar; its unit is one optimiser step."""
        pooled = loop.aggregation.pools_clients
        self._steps_per_round = sum(
            loop.trainer.num_steps(None if pooled else client) for client in range(len(loop.state.bank))
        )
        total = int(self._steps_per_round * loop.settings.num_rounds * loop.settings.participation_rate)
        self._num_rounds = loop.settings.num_rounds
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        done = int(sum(loop.state.local_steps))
        self._task = self._progress.add_task(self.title, total=total, completed=done)
        self._progress.start()

    def on_step_end(self, loop: FederatedLoop, loss: float) -> None:
        """Advance the bar by one step."""
        assert self._progress is not None
        self._progress.advance(self._task)

    def on_client_start(self, loop: FederatedLoop, client: int) -> None:
        """Show which client trains."""
        assert self._progress is not None
        shown = loop.state.round_index + 1
        text = f"{self.title} · round {shown}/{self._num_rounds} · client {client} · val {self._value:.4f}"
        self._progress.update(self._task, description=text)

    def on_evaluate_end(self, loop: FederatedLoop, evaluation: Evaluation) -> None:
        """Remember the metric for the bar."""
        if evaluation.stage == "val":
            self._value = evaluation.summary[f"{self.metric}/mean"]

    def on_round_end(self, loop: FederatedLoop, record: RoundRecord) -> None:
        """Without a terminal, write one line per round."""
        if not self.console.is_terminal:
            losses = [update.loss for update in record.updates]
            self.console.print(
                f"{self.title}: round {record.round_index + 1}/{self._num_rounds}, "
                f"train loss {sum(losses) / len(losses):.4f}, val {self.metric} {self._value:.4f}, "
                f"{record.seconds:.1f} s",
                highlight=False,
                soft_wrap=True,
            )

    def on_fit_end(self, loop: FederatedLoop) -> None:
        """Close the bar."""
        self._stop()

    def on_exception(self, loop: FederatedLoop, error: BaseException) -> None:
        """Close the bar, so that the message stands on a line of its own."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
