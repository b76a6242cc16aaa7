"""What MLflow sees of a run: parameters, one batch of metrics per round, matrices, tables, adapters."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from fellrec.callbacks.costs import CostMeter
from fellrec.errors import FellrecError
from fellrec.federated.callback import FederatedCallback
from fellrec.functional.nested import flatten
from fellrec.tracking.run_log import RunLog
from fellrec.types import Aggregated, Evaluation, RoundRecord

if TYPE_CHECKING:
    from fellrec.federated.loop import FederatedLoop

_TABLE = "clients.json"
_FILES = (
    *("clients.csv", "ledger.csv", "results.json", "users.parquet", "targets.parquet", "rankings.parquet"),
    *("partition.parquet", "versions.json"),
)


_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetInput:
    """The data set as MLflow shows it.

    Attributes:
        name: Of the data set.
        key: Hash of everything that shaped it; the digest.
        source: Where it came from.
        statistics: Counts, shown as its profile.
    """

    name: str
    key: str
    source: str
    statistics: Mapping[str, Any]


class MLflowLogging(FederatedCallback):
    """Logs a run; a step is a round. What a resumed run repeats is not logged twice, see ``RunLog``.

    Args:
        log: Of the run; the run directory's ``config.yaml``, ``adapters`` and figures are uploaded.
        params: The resolved configuration; logged flat, with dotted names.
        dataset: The data set.
        log_matrices_every: Rounds between two uploads of mixing and similarity matrices.
        max_clients: In a larger population no figure, matrix or adapter of a single client is sent, only what is said
            of all of them; the run directory has the rest.

    Attributes:
        costs: A meter that stands before this callback in the loop; what it found is logged when the run is over.
    """

    def __init__(
        self,
        log: RunLog,
        params: Mapping[str, Any],
        dataset: DatasetInput,
        log_matrices_every: int = 1,
        max_clients: int = 100,
    ) -> None:
        self.log = log
        self.run_dir = log.run_dir
        self.params = params
        self.dataset = dataset
        self.log_matrices_every = log_matrices_every
        self.max_clients = max_clients
        self.costs: CostMeter | None = None

    def on_fit_start(self, loop: FederatedLoop) -> None:
        """Log parameters, configuration and data set."""
        data = self.dataset
        if not self._logs_clients(loop):
            _log.warning(
                "%d clients are more than tracking.max_logged_clients=%d: MLflow gets the figures over all of them, "
                "%s has those of each",
                loop.num_clients,
                self.max_clients,
                self.run_dir,
            )
        self.log.log_params(flatten(dict(self.params)))
        self.log.log_artifact(self.run_dir / "config.yaml")
        self.log.log_dataset(data.name, data.key, data.source, data.statistics)

    def on_evaluate_end(self, loop: FederatedLoop, evaluation: Evaluation) -> None:
        """Log what no round reports: the start of the run, as step -1, and the test."""
        if evaluation.stage == "test" or evaluation.round_index < 0:
            metrics = evaluation_metrics(evaluation, self._logs_clients(loop))
            self.log.log_metrics(metrics, evaluation.round_index, once=evaluation.stage)

    def on_round_end(self, loop: FederatedLoop, record: RoundRecord) -> None:
        """Log the round at once, and its matrices."""
        logs_clients = self._logs_clients(loop)
        self.log.log_metrics(round_metrics(record, logs_clients), record.round_index, once="round")
        if logs_clients and record.round_index % self.log_matrices_every == 0:
            self._log_matrices(record)

    def on_fit_end(self, loop: FederatedLoop) -> None:
        """Log the per-client table, the figures and the adapters, and close the run."""
        assert loop.test_evaluation is not None
        table = client_table(loop.test_evaluation)
        table.to_csv(self.run_dir / "clients.csv", index=False)
        table.to_json(self.run_dir / _TABLE, orient="split", index=False, date_format="iso")
        loop.execution.ledger.frame().to_csv(self.run_dir / "ledger.csv", index=False)
        if self.costs is not None and self.costs.cost is not None:
            self.log.log_metrics(self.costs.cost.metrics(), step=max(0, loop.state.round_index - 1), once="cost")
        for name in (_TABLE, *_FILES):
            self.log.log_artifact(self.run_dir / name)
        # How MLflow's UI knows that an artefact is a table.
        self.log.set_tag("mlflow.loggedArtifacts", json.dumps([{"path": _TABLE, "type": "table"}]))
        if self._logs_clients(loop):
            self.log.log_artifact(self.run_dir / "adapters", "adapters")
        self.log.close()

    def on_exception(self, loop: FederatedLoop, error: BaseException) -> None:
        """Mark the run as killed or failed."""
        try:
            self.log.set_tag("error", str(error))
            self.log.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        except FellrecError as second:  # the first error is the one to see
            _log.warning("%s", second)

    def _logs_clients(self, loop: FederatedLoop) -> bool:
        return loop.num_clients <= self.max_clients

    def _log_matrices(self, record: RoundRecord) -> None:
        from fellrec.report.plots import heat_map, save_png

        clients = [update.client for update in record.updates]
        folder = self.run_dir / "matrices" / f"round_{record.round_index:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, matrix in record.aggregated.matrices.items():
            values = matrix.tolist()
            (folder / f"{name}.json").write_text(json.dumps({"clients": clients, "matrix": values}))
            title = f"{name}, round {record.round_index}"
            save_png(heat_map(values, clients, title, is_mixing=name == "mixing"), folder / f"{name}.png")
        if record.aggregated.matrices:
            self.log.log_artifact(folder, f"matrices/{folder.name}")


def evaluation_metrics(evaluation: Evaluation, has_clients: bool = True) -> dict[str, float]:
    """Names and values of one evaluation: ``val/ndcg_at_10/mean``, ``val/client_03/ndcg_at_10``, …

    Args:
        evaluation: Of one stage.
        has_clients: Whether the clients' own figures are among them.
    """
    stage = evaluation.stage
    metrics = {f"{stage}/{name}": value for name, value in evaluation.summary.items()}
    for name, values in evaluation.per_client.items() if has_clients else ():
        for client, value in enumerate(values.tolist()):
            if not math.isnan(value):  # a client without evaluated users has no value
                metrics[f"{stage}/client_{client:02d}/{name}"] = value
    return metrics


def round_metrics(record: RoundRecord, has_clients: bool = True) -> dict[str, float]:
    """Names and values of one round, its validation included.

    Args:
        record: Of the round.
        has_clients: Whether the clients' own figures are among them.
    """
    losses = [update.loss for update in record.updates]
    metrics = {"cost/round_seconds": record.seconds, "train/loss/mean": sum(losses) / len(losses)}
    for update in record.updates if has_clients else ():
        prefix = f"train/client_{update.client:02d}"
        metrics |= {f"{prefix}/loss": update.loss, f"{prefix}/seconds": update.seconds}
    metrics |= record.costs
    if record.dropped:
        metrics["train/num_dropped_clients"] = len(record.dropped)
    if has_clients:
        metrics |= _per_client(record.aggregated, [update.client for update in record.updates])
    return metrics | (evaluation_metrics(record.evaluation, has_clients) if record.evaluation else {})


def client_table(evaluation: Evaluation) -> pd.DataFrame:
    """One row per client: its evaluated users and its metrics."""
    table = pd.DataFrame({name: values.numpy() for name, values in evaluation.per_client.items()})
    users = pd.Series(evaluation.client_of_user.numpy()).value_counts().reindex(table.index, fill_value=0)
    table.insert(0, "users", users)
    table.insert(0, "client", table.index)
    return table


def _per_client(aggregated: Aggregated, clients: list[int]) -> dict[str, float]:
    return {
        f"aggregation/client_{client:02d}/{name}": float(value)
        for name, values in aggregated.per_client.items()
        for client, value in zip(clients, values, strict=True)
    }
