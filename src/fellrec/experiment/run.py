"""One run, from its directory to its result; what ``train`` and ``compare`` share."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.callbacks.costs import CostMeter
from fellrec.callbacks.mlflow_logging import DatasetInput, MLflowLogging
from fellrec.callbacks.preemption import Preemption
from fellrec.callbacks.progress import RoundProgress
from fellrec.config.instantiate import as_dict, settings
from fellrec.distributed.memory import peak_bytes
from fellrec.experiment import Recommender, build_loop, frozen_parameters
from fellrec.experiment.run_dir import check_prompt, new_run_dir, versions, write_evaluation, write_start
from fellrec.experiment.storage import storage_of
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.loop import FederatedLoop
from fellrec.launch.preemption import StopSignals
from fellrec.rankers.reference import ReferenceRanker, reference_rankers
from fellrec.rankers.settings import PRETRAINED, ReferenceSettings
from fellrec.report.comparison import Comparison, RuleResult
from fellrec.report.export import write_users
from fellrec.state.files import explaining_full_disks
from fellrec.state.lock import hold
from fellrec.tracking.run_log import NewRun, RunLog
from fellrec.tracking.settings import TrackingSettings
from fellrec.types import Evaluation, RoundRecord


class Run:
    """One federated run with its directory and its MLflow run.

    Args:
        config: The composed configuration; its ``run_dir`` must be new unless ``resume`` is set.
        recommender: What the rules of a comparison share.
        parent_uid: ``RunLog.uid`` of the run that groups a comparison.
        rule: The rule's name in a comparison, with the settings that vary there; ``None`` for the name alone.
        variant: What tells this run from others of the comparison with the same rule and seed.
        signals: What may ask the run to stop; entered by the command.
    """

    def __init__(
        self,
        config: DictConfig,
        recommender: Recommender,
        parent_uid: str | None = None,
        rule: str | None = None,
        variant: str = "",
        signals: StopSignals | None = None,
    ) -> None:
        self.config = config
        self.recommender = recommender
        self.rule = rule or rule_name(config)
        self.variant = variant
        self.label = f"{config.data.name}-{run_name(self.rule, variant, config.seed)}"
        self.run_dir = Path(config.run_dir) if config.resume else new_run_dir(config.run_dir, self.label)
        self.parent_uid = parent_uid
        self.signals = signals
        self.loop: FederatedLoop | None = None

    def execute(self) -> RuleResult:
        """Train, test, and write everything down.

        Raises:
            TrainingError: If a client's training diverges; the last checkpoint stays.
            StorageError: If the disk is full or read-only; so does it then.
        """
        with explaining_full_disks(self.run_dir), hold(self.run_dir):
            return self._execute()

    def _execute(self) -> RuleResult:
        config, recommender = self.config, self.recommender
        loop = self.loop = build_loop(config, recommender, ())
        checkpoint = Checkpoint(self.run_dir, config.trainer.checkpoint_every)
        check_prompt(self.run_dir, recommender.module.objective)
        if self._has_checkpoint:
            checkpoint.resume(loop)
        else:
            write_start(self.run_dir, config, recommender.data, recommender.module.objective.facts)
        logging = self._mlflow()
        clock, meter = _Clock(), CostMeter(config.split.transport, lambda: storage_of(config, recommender))
        logging.costs = meter
        loop.callbacks += [
            RoundProgress(self.label, config.trainer.metric),
            clock,
            meter,
            _Outputs(self, meter),
            logging,
            # Last: a round that was stopped before it was logged is run, and logged, again.
            checkpoint,
            *([Preemption(self.signals)] if self.signals else []),
        ]
        try:
            evaluation = loop.run()
        except BaseException as error:
            self._say_how_to_resume(error)
            raise
        return RuleResult(
            rule=self.rule,
            seed=config.seed,
            kind="learned",
            evaluation=evaluation,
            seconds_per_round=clock.seconds_per_round,
            total_seconds=clock.total_seconds,
            peak_memory_bytes=peak_bytes(),
            best_round=loop.state.selection.round_index,
            validation=loop.state.selection.value,
            run_id=logging.log.run_id,
            variant=self.variant,
            cost=meter.cost,
        )

    @property
    def _has_checkpoint(self) -> bool:
        """A run that is to go on and has none was stopped before its first: it starts again."""
        return any((self.run_dir / "checkpoints").glob("round_*"))

    def _say_how_to_resume(self, error: BaseException) -> None:
        if self._has_checkpoint:
            what = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
            sys.stderr.write(f"\n{what}; go on from there: fellrec train resume={self.run_dir}\n")

    def _mlflow(self) -> MLflowLogging:
        config, data = self.config, self.recommender.data
        tags = {
            "rule": self.rule,
            "data": data.name,
            "backbone": self.recommender.backbone.name,
            **({"variant": self.variant} if self.variant else {}),
            **self.recommender.module.objective.facts,
            **{name: value for name, value in versions().items() if name in ("fellrec", "git_commit")},
        }
        new = NewRun(config.tracking.uri, config.tracking.experiment, self.label, tags, self.parent_uid)
        source = str(config.data.root or "embedded")
        dataset = DatasetInput(data.name, data.key, source, data.statistics)
        log = RunLog(self.run_dir, new)
        return MLflowLogging(log, as_dict(config), dataset, max_clients=config.tracking.max_logged_clients)


class _Clock(FederatedCallback):
    """Measures the rounds and the whole run."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._rounds: list[float] = []

    @property
    def seconds_per_round(self) -> float:
        """Mean wall seconds of training and aggregation, evaluation left out."""
        return sum(self._rounds) / max(1, len(self._rounds))

    @property
    def total_seconds(self) -> float:
        """Wall seconds since the run began, evaluation included."""
        return time.perf_counter() - self._started

    def on_round_end(self, loop: FederatedLoop, record: RoundRecord) -> None:
        """Take the round's time."""
        self._rounds.append(record.seconds)


class _Outputs(FederatedCallback):
    """Writes the test results and the selected adapters into the run directory."""

    def __init__(self, run: Run, meter: CostMeter) -> None:
        self.run = run
        self.meter = meter

    def on_fit_end(self, loop: FederatedLoop) -> None:
        """Write ``results.json``, what there is of single users, and ``adapters/``."""
        evaluation, recommender = loop.test_evaluation, self.run.recommender
        assert evaluation is not None
        assert evaluation.first_items is not None
        assert self.meter.cost is not None
        about = {
            "rule": self.run.rule,
            "seed": self.run.config.seed,
            "cost": self.meter.cost.to_dict(),
            "cold": recommender.cold.counts(),
            "num_tied_users": int(evaluation.first_items.is_tied.sum()),
            **absences(loop),
        }
        write_evaluation(self.run.run_dir, evaluation, about)
        write_users(self.run.run_dir, evaluation, recommender.data, recommender.cold)
        bank, rows = loop.selected
        own, elsewhere = loop.state.bank_named(bank), loop.execution.adapters_elsewhere(self.run.run_dir, bank)
        for row in sorted(row for row in set(rows) if not loop.execution.is_lost(row)):
            name = f"client_{row:02d}" if len(set(rows)) > 1 else "shared"
            adapter = {**own.row(row), **{key: stack[row] for key, stack in elsewhere.items()}}
            adapter = {key: adapter[key] for key in sorted(adapter)}
            folder = self.run.run_dir / "adapters" / name
            recommender.adapter.save(adapter, recommender.backbone, lambda: frozen_parameters(recommender), folder)


def absences(loop: FederatedLoop) -> dict[str, Any]:
    """Clients that did not finish a round, by round, and those whose process is gone; empty if all went well."""
    found = {
        "dropped_clients": loop.state.extras.get("dropped_clients"),
        "lost_clients": [client for client in range(loop.num_clients) if loop.execution.is_lost(client)],
    }
    return {name: value for name, value in found.items() if value}


def absence_message(loop: FederatedLoop) -> str:
    """The same for people; empty if all went well."""
    found = absences(loop)
    lines = [
        f"Round {round_index} went on without clients {', '.join(map(str, clients))}."
        for round_index, clients in found.get("dropped_clients", {}).items()
    ]
    if "lost_clients" in found:
        lost = ", ".join(map(str, found["lost_clients"]))
        lines.append(f"The process of clients {lost} is gone: their users are in no later evaluation.")
    return "\n".join(lines)


def rule_name(config: DictConfig) -> str:
    """The rule's name in tables: its class's name in lower case."""
    return str(config.aggregation["_target_"]).rpartition(".")[2].lower()


def run_name(rule: str, variant: str, seed: int) -> str:
    """A name for files and MLflow, such as ``fedavg-head_layers=2-s0``."""
    return "-".join([*rule.split(), *variant.split(), f"s{seed}"])


def table_cutoff(config: DictConfig) -> int:
    """The cutoff that tables show: 10 if it is among the run's, else its first."""
    cutoffs = list(config.trainer.cutoffs)
    return 10 if 10 in cutoffs else int(cutoffs[0])


def collect(recommender: Recommender, results: Sequence[RuleResult]) -> Comparison:
    """Results with the sizes of the partition they were made on."""
    data = recommender.data
    users_per_client = data.statistics["users_per_client"]
    return Comparison(data.name, users_per_client, len(data.catalogue), results, cold=recommender.cold.counts())


def reference_results(
    config: DictConfig, recommender: Recommender, loop: FederatedLoop, stage: str = "test"
) -> list[RuleResult]:
    """The reference rankers that ``references.show`` names, and the backbone before any round, on the same users."""
    data, seed = recommender.data, config.seed
    shown = settings(ReferenceSettings, config.references, "references")
    rankers = reference_rankers(data.train, data.client_of_user, len(data.catalogue), shown, seed)
    results = [
        RuleResult(name, seed, "reference", _evaluate(recommender, ranker, stage)) for name, ranker in rankers.items()
    ]
    if PRETRAINED in shown.show:
        name = PRETRAINED if recommender.backbone.is_pretrained else "untrained"
        results.append(RuleResult(name, seed, "reference", loop.evaluate_start(stage)))
    return results


def finish_message(run_dir: Path, config: DictConfig) -> str:
    """Where the run lies, and how to look at it."""
    uri = config.tracking.uri
    option = "" if uri == TrackingSettings.uri else f" tracking.uri={uri}"
    where = f"MLflow: {uri}, experiment {config.tracking.experiment}"
    return f"Run directory: {run_dir}\n{where}; open it by: fellrec ui{option}"


def _evaluate(recommender: Recommender, ranker: ReferenceRanker, stage: str) -> Evaluation:
    module = recommender.module
    with torch.no_grad():  # in float32, whatever the model's precision
        for batch in recommender.datamodule.eval_loader(stage):
            moved = recommender.fabric.to_device(batch)
            module.add_scores(ranker.scores(moved["histories"], moved), moved)
    return module.finish_reference(stage)
