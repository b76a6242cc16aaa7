"""What MLflow receives of a run: parameters, metrics of every round, tables, adapters."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fellrec.callbacks import evaluations
from fellrec.callbacks.costs import CostMeter
from fellrec.errors import FellrecError
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.population import Population
from fellrec.federated.records import FitResult, FitStart, RoundRecord
from fellrec.functional.balance import STATISTICS
from fellrec.functional.nested import flatten
from fellrec.functional.ranges import Natural
from fellrec.tracking.headline import client_name
from fellrec.tracking.run_log import RunLog
from fellrec.types import Evaluation

TABLE = "clients.json"
_TABLES = (TABLE, evaluations.TABLE)
COSTS = "client_costs.csv"
_FILES = (
    *("clients.csv", COSTS, evaluations.FILE, "ledger.csv", "results.json", "users.parquet", "targets.parquet"),
    *("rankings.parquet", "partition.parquet", "versions.json"),
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
    """Logs a run; a step is a round, and 0 for what a run has once; the tag ``best_round`` says which was tested.

    What a resumed run repeats is not logged twice, see ``RunLog``.

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
        self._num_clients: int | None = None

    def on_fit_start(self, fit: FitStart) -> None:
        """Log parameters, configuration and data set."""
        data = self.dataset
        self._num_clients = fit.num_clients
        self._logs_clients = fit.num_clients <= self.max_logged_clients
        if not self._logs_clients:
            _log.warning(
                "%d clients are more than tracking.max_logged_clients=%d: MLflow receives figures over all clients, %s "
                "has those of each",
                fit.num_clients,
                self.max_logged_clients,
                self.run_dir,
            )
        self.log.log_params(shown_params(self.params))
        self.log.log_artifact(self.run_dir / "config.yaml")
        self.log.log_dataset(data.name, data.key, data.source, data.statistics)

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        """Log what is not part of a round: the start of the run, as step -1, and the test."""
        if evaluation.stage == "test" or evaluation.round_index < 0:
            self.log.log_metrics(evaluation_metrics(evaluation), step_of(evaluation), once=evaluation.stage)

    def on_round_end(self, record: RoundRecord) -> None:
        """Log the round."""
        self.log.log_metrics(round_metrics(record, self._num_clients), record.round_index, once="round")

    def on_fit_end(self, result: FitResult) -> None:
        """Log the costs, the files and the adapters, and close the run."""
        if self.costs is not None and self.costs.cost is not None:
            self.log.log_metrics(self.costs.cost.metrics(), step=0, once="cost")
        self.log.set_tag("best_round", str(result.best_round))
        for name in (*_TABLES, *_FILES):
            self.log.log_artifact(self.run_dir / name)
        # How MLflow's UI knows that an artefact is a table.
        tables = [{"path": name, "type": "table"} for name in _TABLES if (self.run_dir / name).exists()]
        self.log.set_tag("mlflow.loggedArtifacts", json.dumps(tables))
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


def shown_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, flat, that say something: no unset ones, no paths of classes beside the names of choices.

    A class of the user's own is kept: nothing else names it. ``config.yaml`` has everything.

    Example:
        >>> shown_params({"resume": None, "holdout": {"_target_": "fellrec.data.holdout.LeaveOneOut", "min_length": 3}})
        {'holdout': 'LeaveOneOut', 'holdout.min_length': 3}
        >>> shown_params({"callbacks": {"balance": {"_target_": "fellrec.callbacks.mlflow_logging.Balance"}}})
        {}
    """
    found = {}
    for key, value in flatten(dict(params)).items():
        group, is_target = key.removesuffix("._target_"), key.endswith("_target_")
        is_ours = is_target and str(value).startswith("fellrec.")
        if value is None or (is_ours and group.startswith("callbacks.")) or value in ([], {}):
            continue
        found[group if is_target else key] = str(value).rpartition(".")[2] if is_ours else value
    return found


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
            self.log.log_metrics(metrics, step_of(evaluation), once=f"balance {evaluation.stage}")


class ClientMetrics(FederatedCallback):
    """Logs every client's metrics, loss and values of the aggregation, and writes tables of the clients.

    ``clients.csv`` has the tested metrics. ``client_costs.csv`` has beside them ``adapter_bytes``, what a client
    trains, and ``seconds_per_round``, its mean local training; where LoRA ranks can differ, also its ``rank``; where
    heads differ, also ``head_layers`` and ``stored_bytes``, the parameters of its head and tail.

    Args:
        log: Of the run.
        population: Its clients; ``None`` for no table of costs.
        heads: Of the clients, where they differ; see ``fellrec.experiment.storage.Head``.
        max_logged_clients: In a larger population nothing of single clients is sent to MLflow.
    """

    def __init__(
        self,
        log: RunLog,
        population: Population | None = None,
        max_logged_clients: Natural = 100,
        heads: Sequence[Any] = (),
    ) -> None:
        self.log = log
        self.population = population
        self.heads = heads
        self.rounds: dict[int, tuple[int, float]] = {}
        self.run_dir = log.run_dir
        self.max_logged_clients = max_logged_clients
        self._is_on = True

    def on_fit_start(self, fit: FitStart) -> None:
        """Count the clients."""
        self._is_on = fit.num_clients <= self.max_logged_clients

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        """Log ``val/ndcg_at_10/client/03`` and so on."""
        if self._is_on:
            metrics = client_metrics(evaluation)
            self.log.log_metrics(metrics, step_of(evaluation), once=f"clients {evaluation.stage}")

    def on_round_end(self, record: RoundRecord) -> None:
        """Log the clients' losses and seconds, and what the aggregation reports of each."""
        in_round: dict[int, float] = {}
        for trained in record.trained:  # a client may have a personal model beside the shared one
            in_round[trained.job.client] = in_round.get(trained.job.client, 0.0) + trained.seconds
        for client, seconds in in_round.items():
            number, total = self.rounds.get(client, (0, 0.0))
            self.rounds[client] = number + 1, total + seconds
        if not self._is_on:
            return
        metrics: dict[str, float] = {}
        for trained in record.trained:
            model = "" if trained.row == trained.job.client else "personal_"
            for name, value in (("loss", trained.loss), ("seconds", trained.seconds)):
                metrics[client_name(f"train/{model}{name}", trained.job.client)] = value
        for name, values in record.aggregated.per_client.items():
            for client, value in zip(record.clients, values, strict=True):
                metrics[client_name(f"aggregation/{name}", client)] = float(value)
        self.log.log_metrics(metrics, record.round_index, once="clients round")

    def on_fit_end(self, result: FitResult) -> None:
        """Write ``clients.csv`` and the table that MLflow shows."""
        table = client_table(result.evaluation)
        table.to_csv(self.run_dir / "clients.csv", index=False)
        if self.population is not None:
            costs = self._costs(self.population, len(table)).join(table.drop(columns="client"))
            costs.to_csv(self.run_dir / COSTS, index=False)
        table.to_json(self.run_dir / TABLE, orient="split", index=False, date_format="iso")

    def _costs(self, population: Population, num_clients: int) -> pd.DataFrame:
        """One row per client; NaN for the seconds of one that has not trained by itself."""
        ranks, initial, rows = population.needs.ranks, population.initial.tensors(), []
        for client in range(num_clients):
            number, total = self.rounds.get(client, (0, 0.0))
            own = [tensor if ranks is None else ranks.narrow(client, name, tensor) for name, tensor in initial.items()]
            rows.append(
                {
                    "client": client,
                    "rank": None if ranks is None else ranks.of_row(client),
                    "head_layers": self.heads[client].num_layers if self.heads else None,
                    "stored_bytes": self.heads[client].stored_bytes if self.heads else None,
                    "adapter_bytes": sum(tensor.numel() * tensor.element_size() for tensor in own),
                    "seconds_per_round": total / number if number else math.nan,
                }
            )
        return pd.DataFrame(rows).dropna(axis=1, how="all")

    def state_dict(self) -> dict[str, Any]:
        """Rounds and seconds of each client so far."""
        return {"rounds": {str(client): list(own) for client, own in self.rounds.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self.rounds = {int(client): (number, total) for client, (number, total) in state["rounds"].items()}


def step_of(evaluation: Evaluation) -> int:
    """The step of an evaluation: its round; 0 for the test, which a run has once: MLflow draws bars of it."""
    return 0 if evaluation.stage == "test" else evaluation.round_index


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Names and values of one evaluation over all clients: ``val/ndcg_at_10/mean``, …, without those of balance."""
    return {f"{evaluation.stage}/{name}": v for name, v in evaluation.summary.items() if not _is_balance(name)}


def client_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Names and values of every client: ``val/ndcg_at_10/client/03``, …; a client without evaluated users has none."""
    return {
        client_name(f"{evaluation.stage}/{name}", client): value
        for name, values in evaluation.per_client.items()
        for client, value in enumerate(values.tolist())
        if not math.isnan(value)
    }


def round_metrics(record: RoundRecord, num_clients: int | None = None) -> dict[str, float]:
    """Names and values of one round over all clients, its validation included.

    Args:
        record: Of the round.
        num_clients: C: figures of participation are left out where all clients take part; ``None`` keeps them.
    """
    losses: Sequence[float] = [trained.loss for trained in record.trained]
    metrics = {"cost/round_seconds": record.seconds, "train/loss/mean": sum(losses) / len(losses), **record.costs}
    metrics |= {f"aggregation/{k}": v for k, v in record.aggregated.metrics.items() if math.isfinite(v)}
    if record.cohort is not None and not _is_everyone(record, num_clients):
        metrics |= record.cohort.metrics
    if record.failed:
        metrics["train/num_dropped_clients"] = len(record.failed)
    return metrics | (evaluation_metrics(record.evaluation) if record.evaluation else {})


def client_table(evaluation: Evaluation) -> pd.DataFrame:
    """One row per client: its evaluated users, whether it is poisoned if any is, and its metrics."""
    table = pd.DataFrame({name: values.numpy() for name, values in evaluation.per_client.items()})
    users = pd.Series(evaluation.client_of_user.numpy()).value_counts().reindex(table.index, fill_value=0)
    table.insert(0, "users", users)
    table.insert(0, "client", table.index)
    if evaluation.poisoned:
        table.insert(2, "poisoned", table.index.isin(evaluation.poisoned))
    return table


def _is_everyone(record: RoundRecord, num_clients: int | None) -> bool:
    """Whether all clients, or their pooled data, were trained from the model of this round."""
    cohort, jobs = record.cohort, [trained.job for trained in record.trained]
    if cohort is None or cohort.dropped or cohort.late or set(cohort.start_rounds) != {record.round_index}:
        return False
    trained = {job.client for job in jobs if not job.is_at_server}
    return any(job.data_of is None for job in jobs) or len(trained) == num_clients


def _is_balance(name: str) -> bool:
    return name.rpartition("/")[2] in STATISTICS
