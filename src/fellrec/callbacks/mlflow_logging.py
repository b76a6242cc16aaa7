"""What MLflow receives of a run: parameters, metrics of every round, tables, adapters."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fellrec.callbacks.costs import CostMeter
from fellrec.errors import FellrecError
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import FitResult, FitStart, RoundRecord
from fellrec.functional.balance import STATISTICS
from fellrec.functional.nested import flatten
from fellrec.functional.ranges import Natural
from fellrec.tracking.run_log import RunLog
from fellrec.types import Evaluation

TABLE = "clients.json"
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

    Figures of single clients and of balance are logged by ``ClientMetrics`` and ``Balance``.

    Args:
        log: Of the run; the run directory's ``config.yaml``, ``adapters`` and figures are uploaded.
        params: The resolved configuration; logged flat, with dotted names.
        dataset: The data set.
        costs: Meter of the run, earlier in the list; what it found is logged when the run is over.
        max_logged_clients: In a larger population no adapter is uploaded; the run directory has them.
    """

    def __init__(
        self,
        log: RunLog,
        params: Mapping[str, Any],
        dataset: DatasetInput,
        costs: CostMeter | None = None,
        max_logged_clients: Natural = 100,
    ) -> None:
        self.log = log
        self.run_dir = log.run_dir
        self.params = params
        self.dataset = dataset
        self.costs = costs
        self.max_logged_clients = max_logged_clients
        self._logs_clients = True

    def on_fit_start(self, fit: FitStart) -> None:
        """Log parameters, configuration and data set."""
        data = self.dataset
        self._logs_clients = fit.num_clients <= self.max_logged_clients
        if not self._logs_clients:
            _log.warning(
                "%d clients are more than tracking.max_logged_clients=%d: MLflow receives figures over all clients, %s "
                "has those of each",
                fit.num_clients,
                self.max_logged_clients,
                self.run_dir,
            )
        self.log.log_params(flatten(dict(self.params)))
        self.log.log_artifact(self.run_dir / "config.yaml")
        self.log.log_dataset(data.name, data.key, data.source, data.statistics)

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        """Log what is not part of a round: the start of the run, as step -1, and the test."""
        if evaluation.stage == "test" or evaluation.round_index < 0:
            self.log.log_metrics(evaluation_metrics(evaluation), evaluation.round_index, once=evaluation.stage)

    def on_round_end(self, record: RoundRecord) -> None:
        """Log the round."""
        self.log.log_metrics(round_metrics(record), record.round_index, once="round")

    def on_fit_end(self, result: FitResult) -> None:
        """Log the costs, the files and the adapters, and close the run."""
        if self.costs is not None and self.costs.cost is not None:
            self.log.log_metrics(self.costs.cost.metrics(), step=max(0, result.num_rounds - 1), once="cost")
        for name in (TABLE, *_FILES):
            self.log.log_artifact(self.run_dir / name)
        # How MLflow's UI knows that an artefact is a table.
        self.log.set_tag("mlflow.loggedArtifacts", json.dumps([{"path": TABLE, "type": "table"}]))
        if self._logs_clients:
            self.log.log_artifact(self.run_dir / "adapters", "adapters")
        self.log.close()

    def on_exception(self, error: BaseException) -> None:
        """Mark the run as killed or failed."""
        try:
            self.log.set_tag("error", str(error))
            self.log.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        except FellrecError as second:  # the first error is the one to see
            _log.warning("%s", second)


class Balance(FederatedCallback):
    """Logs how evenly clients are served: every balance statistic of every metric, after every evaluation.

    Args:
        log: Of the run.
    """

    def __init__(self, log: RunLog) -> None:
        self.log = log

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        """Log the statistics of one evaluation."""
        figures = {name: value for name, value in evaluation.summary.items() if _is_balance(name)}
        if figures:
            metrics = {f"{evaluation.stage}/{name}": value for name, value in figures.items()}
            self.log.log_metrics(metrics, evaluation.round_index, once=f"balance {evaluation.stage}")


class ClientMetrics(FederatedCallback):
    """Logs every client's metrics, loss and values of the aggregation, and writes a table of the tested metrics.

    Args:
        log: Of the run.
        max_logged_clients: In a larger population nothing of single clients is sent to MLflow.
    """

    def __init__(self, log: RunLog, max_logged_clients: Natural = 100) -> None:
        self.log = log
        self.run_dir = log.run_dir
        self.max_logged_clients = max_logged_clients
        self._is_on = True

    def on_fit_start(self, fit: FitStart) -> None:
        """Count the clients."""
        self._is_on = fit.num_clients <= self.max_logged_clients

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        """Log ``val/client_03/ndcg_at_10`` and so on."""
        if self._is_on:
            metrics = client_metrics(evaluation)
            self.log.log_metrics(metrics, evaluation.round_index, once=f"clients {evaluation.stage}")

    def on_round_end(self, record: RoundRecord) -> None:
        """Log the clients' losses and seconds, and what the aggregation reports of each."""
        if not self._is_on:
            return
        metrics: dict[str, float] = {}
        for trained in record.trained:
            model = "" if trained.row == trained.job.client else "personal_"
            prefix = f"train/{model}client_{trained.job.client:02d}"
            metrics |= {f"{prefix}/loss": trained.loss, f"{prefix}/seconds": trained.seconds}
        for name, values in record.aggregated.per_client.items():
            for client, value in zip(record.clients, values, strict=True):
                metrics[f"aggregation/client_{client:02d}/{name}"] = float(value)
        self.log.log_metrics(metrics, record.round_index, once="clients round")

    def on_fit_end(self, result: FitResult) -> None:
        """Write ``clients.csv`` and the table that MLflow shows."""
        table = client_table(result.evaluation)
        table.to_csv(self.run_dir / "clients.csv", index=False)
        table.to_json(self.run_dir / TABLE, orient="split", index=False, date_format="iso")


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Names and values of one evaluation over all clients: ``val/ndcg_at_10/mean``, …, without those of balance."""
    return {f"{evaluation.stage}/{name}": v for name, v in evaluation.summary.items() if not _is_balance(name)}


def client_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Names and values of every client: ``val/client_03/ndcg_at_10``, …; a client without evaluated users has none."""
    return {
        f"{evaluation.stage}/client_{client:02d}/{name}": value
        for name, values in evaluation.per_client.items()
        for client, value in enumerate(values.tolist())
        if not math.isnan(value)
    }


def round_metrics(record: RoundRecord) -> dict[str, float]:
    """Names and values of one round over all clients, its validation included."""
    losses: Sequence[float] = [trained.loss for trained in record.trained]
    metrics = {"cost/round_seconds": record.seconds, "train/loss/mean": sum(losses) / len(losses), **record.costs}
    metrics |= {f"aggregation/{k}": v for k, v in record.aggregated.metrics.items() if math.isfinite(v)}
    if record.cohort is not None:
        metrics |= record.cohort.metrics
    if record.failed:
        metrics["train/num_dropped_clients"] = len(record.failed)
    return metrics | (evaluation_metrics(record.evaluation) if record.evaluation else {})


def client_table(evaluation: Evaluation) -> pd.DataFrame:
    """One row per client: its evaluated users and its metrics."""
    table = pd.DataFrame({name: values.numpy() for name, values in evaluation.per_client.items()})
    users = pd.Series(evaluation.client_of_user.numpy()).value_counts().reindex(table.index, fill_value=0)
    table.insert(0, "users", users)
    table.insert(0, "client", table.index)
    return table


def _is_balance(name: str) -> bool:
    return name.rpartition("/")[2] in STATISTICS
