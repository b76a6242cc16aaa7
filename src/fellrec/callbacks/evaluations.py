"""Every figure of every evaluation of a run as one table; MLflow's charts have the few that runs are compared by."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import FitResult, FitStart
from fellrec.functional.balance import STATISTICS
from fellrec.types import Evaluation

FILE, TABLE = "evaluations.csv", "evaluations.json"
FIGURES = ("mean", "pooled", *STATISTICS)
COLUMNS = ("stage", "round", "metric", *FIGURES, "value")


class Evaluations(FederatedCallback):
    """Writes ``evaluations.csv``, one row for each metric of each evaluation, and the same for MLflow's table view.

    ``mean`` counts each client once, ``pooled`` each user; the other figures are those of balance over clients. What is
    one number, such as ``num_users``, is in ``value``.

    Args:
        run_dir: The run's directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE
        self.run_dir = run_dir
        self._written: set[tuple[str, int]] = set()

    def on_fit_start(self, fit: FitStart) -> None:
        """Begin the table, or remove what a resumed run will write again and a row that a crash left incomplete."""
        self._keep(lambda stage, round_index: stage != "test" and round_index < fit.round_index)

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        """Add the evaluation; one that a resumed run repeats takes the place of the first."""
        this = (evaluation.stage, evaluation.round_index)
        if this in self._written:
            self._keep(lambda *other: other != this)
        self._written.add(this)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerows(rows(evaluation))

    def on_fit_end(self, result: FitResult) -> None:
        """Write the table for MLflow."""
        table = pd.read_csv(self.path)
        table.to_json(self.run_dir / TABLE, orient="split", index=False)

    def _keep(self, is_kept: Callable[[str, int], bool]) -> None:
        """Keep the header and the complete rows of some stages and rounds."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
        found = [(line, _key(line)) for line in lines[1:] if line.endswith("\n")]
        kept = [(line, key) for line, key in found if is_kept(*key)]
        self.path.write_text("".join([",".join(COLUMNS) + "\n", *(line for line, _ in kept)]))
        self._written = {key for _, key in kept}


def rows(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """One row for each metric of an evaluation, by `COLUMNS`."""
    found: dict[str, dict[str, float]] = {}
    for name, value in evaluation.summary.items():
        metric, _, figure = name.rpartition("/")
        if figure not in FIGURES:
            metric, figure = name, "value"
        found.setdefault(metric, {})[figure] = value
    for metric, figures in found.items():
        yield {"stage": evaluation.stage, "round": evaluation.round_index, "metric": metric, **figures}


def _key(line: str) -> tuple[str, int]:
    stage, round_text, *_ = line.split(",")
    return stage, int(round_text)
