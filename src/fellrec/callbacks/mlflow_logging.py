"""What MLflow sees of a run: parameters, one batch of metrics per round, matrices, tables, adapters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from lightning.pytorch.loggers import MLFlowLogger

from fellrec.callbacks.costs import CostMeter
from fellrec.federated.hooks import FederatedCallback
from fellrec.functional.nested import flatten
from fellrec.types import Aggregated, Evaluation, RoundRecord

if TYPE_CHECKING:
    from fellrec.federated.loop import FederatedLoop

_LONGEST_PARAM = 500
_FILES = ("clients.csv", "ledger.csv", "results.json", "users.parquet", "partition.parquet", "versions.json")


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
    """Logs a run through Lightning's ``MLFlowLogger``; a step is a round.

    Args:
        logger: On the store, with the run's tags.
        run_dir: Its ``config.yaml``, ``adapters`` and figures are uploaded.
        params: The resolved configuration; logged flat, with dotted names.
        dataset: The data set.
        is_resumed: The run exists; its parameters and data set are not logged again.
        log_matrices_every: Rounds between two uploads of mixing and similarity matrices.

    Attributes:
        costs: A meter that stands before this callback in the loop; what it found is logged when the run is over.
    """

    def __init__(
        self,
        logger: MLFlowLogger,
        run_dir: Path,
        params: Mapping[str, Any],
        dataset: DatasetInput,
        is_resumed: bool = False,
        log_matrices_every: int = 1,
    ) -> None:
        self.logger = logger
        self.run_dir = run_dir
        self.params = params
        self.dataset = dataset
        self.is_resumed = is_resumed
        self.log_matrices_every = log_matrices_every
        self.costs: CostMeter | None = None

    @property
    def run_id(self) -> str:
        """The MLflow run's id; the run is created when this is first read."""
        return str(self.logger.run_id)

    def on_fit_start(self, loop: FederatedLoop) -> None:
        """Log parameters, configuration and data set once."""
        if self.is_resumed:
            client = self.logger.experiment
            client.update_run(self.run_id, status="RUNNING")
            if "error" in client.get_run(self.run_id).data.tags:
                client.delete_tag(self.run_id, "error")
            return
        flat = {key: str(value)[:_LONGEST_PARAM] for key, value in flatten(dict(self.params)).items()}
        self.logger.log_hyperparams(flat)
        self._upload(self.run_dir / "config.yaml")
        self._log_dataset()

    def on_evaluate_end(self, loop: FederatedLoop, evaluation: Evaluation) -> None:
        """Log what no round reports: the start of the run, as step -1, and the test."""
        if evaluation.stage == "test" or evaluation.round_index < 0:
            self.logger.log_metrics(evaluation_metrics(evaluation), step=evaluation.round_index)

    def on_round_end(self, loop: FederatedLoop, record: RoundRecord) -> None:
        """Log the round in one batch, and its matrices."""
        self.logger.log_metrics(round_metrics(record), step=record.round_index)
        if record.round_index % self.log_matrices_every == 0:
            self._log_matrices(record)

    def on_fit_end(self, loop: FederatedLoop) -> None:
        """Log the per-client table, the figures and the adapters, and close the run."""
        assert loop.test_evaluation is not None
        table = client_table(loop.test_evaluation)
        table.to_csv(self.run_dir / "clients.csv", index=False)
        self.logger.experiment.log_table(self.run_id, data=table, artifact_file="clients.json")
        loop.execution.ledger.frame().to_csv(self.run_dir / "ledger.csv", index=False)
        if self.costs is not None and self.costs.cost is not None:
            self.logger.log_metrics(self.costs.cost.metrics(), step=max(0, loop.state.round_index - 1))
        for name in _FILES:
            self._upload(self.run_dir / name)
        if (self.run_dir / "adapters").is_dir():
            self.logger.experiment.log_artifacts(self.run_id, str(self.run_dir / "adapters"), "adapters")
        self.logger.experiment.set_terminated(self.run_id, "FINISHED")

    def on_exception(self, loop: FederatedLoop, error: BaseException) -> None:
        """Mark the run as killed or failed."""
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        self.logger.experiment.set_tag(self.run_id, "error", str(error)[:_LONGEST_PARAM])
        self.logger.experiment.set_terminated(self.run_id, status)

    def _log_matrices(self, record: RoundRecord) -> None:
        from fellrec.tracking.plots import heat_map, save_png

        clients = [update.client for update in record.updates]
        folder = self.run_dir / "matrices" / f"round_{record.round_index:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        for name, matrix in record.aggregated.matrices.items():
            values = matrix.tolist()
            (folder / f"{name}.json").write_text(json.dumps({"clients": clients, "matrix": values}))
            title = f"{name}, round {record.round_index}"
            save_png(heat_map(values, clients, title, is_mixing=name == "mixing"), folder / f"{name}.png")
        if record.aggregated.matrices:
            self.logger.experiment.log_artifacts(self.run_id, str(folder), f"matrices/{folder.name}")

    def _log_dataset(self) -> None:
        from mlflow.entities import Dataset, InputTag
        from mlflow.entities import DatasetInput as MlflowInput

        data = self.dataset
        entity = Dataset(
            name=data.name,
            digest=data.key,
            source_type="local",
            source=json.dumps({"uri": data.source}),
            profile=json.dumps(dict(data.statistics), default=str),
        )
        tags = [InputTag("mlflow.data.context", "training")]
        self.logger.experiment.log_inputs(self.run_id, [MlflowInput(entity, tags)])

    def _upload(self, path: Path) -> None:
        if path.is_file():
            self.logger.experiment.log_artifact(self.run_id, str(path))


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Names and values of one evaluation: ``val/ndcg_at_10/mean``, ``val/client_03/ndcg_at_10``, …"""
    stage = evaluation.stage
    metrics = {f"{stage}/{name}": value for name, value in evaluation.summary.items()}
    for name, values in evaluation.per_client.items():
        for client, value in enumerate(values.tolist()):
            if not math.isnan(value):  # a client without evaluated users has no value
                metrics[f"{stage}/client_{client:02d}/{name}"] = value
    return metrics


def round_metrics(record: RoundRecord) -> dict[str, float]:
    """Names and values of one round, its validation included."""
    losses = [update.loss for update in record.updates]
    metrics = {"cost/round_seconds": record.seconds, "train/loss/mean": sum(losses) / len(losses)}
    for update in record.updates:
        prefix = f"train/client_{update.client:02d}"
        metrics |= {f"{prefix}/loss": update.loss, f"{prefix}/seconds": update.seconds}
    metrics |= record.costs
    if record.dropped:
        metrics["train/num_dropped_clients"] = len(record.dropped)
    metrics |= _per_client(record.aggregated, [update.client for update in record.updates])
    return metrics | (evaluation_metrics(record.evaluation) if record.evaluation else {})


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
