"""One run, from its directory to its result; what ``train`` and ``compare`` share."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from fellrec.callbacks.checkpoint import Checkpoint
from fellrec.callbacks.costs import CostMeter
from fellrec.callbacks.preemption import Preemption
from fellrec.callbacks.progress import Series
from fellrec.config.compose import without_launcher
from fellrec.config.instantiate import as_dict, instantiate
from fellrec.distributed.memory import peak_bytes
from fellrec.errors import ConfigError
from fellrec.experiment.auto import choose
from fellrec.experiment.build import (
    Recommender,
    build_data,
    build_recommender,
    frozen_parameters,
    log_notes,
)
from fellrec.experiment.bundle import save_pyfunc, why_not
from fellrec.experiment.classes import check_classes, check_transforms
from fellrec.experiment.fabric import build_fabric
from fellrec.experiment.federation import Federation, build_federation
from fellrec.experiment.group import in_group
from fellrec.experiment.introduction import introduce
from fellrec.experiment.names import rule_name, run_name
from fellrec.experiment.parent import common_tags, dataset_of
from fellrec.experiment.privacy import build_privacy
from fellrec.experiment.run_dir import (
    check_backbone,
    check_new,
    check_prompt,
    check_same_data,
    new_run_dir,
    note_versions,
    provenance,
    write_backbone,
    write_command,
    write_evaluation,
    write_start,
)
from fellrec.experiment.session import Session, check_processes
from fellrec.experiment.storage import heads_of, storage_of
from fellrec.experiment.store import check_store, store_of
from fellrec.federated.base_change import with_changes
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.records import FitResult
from fellrec.launch.preemption import StopSignals
from fellrec.models.adapters import name_base, plain_name, save_base
from fellrec.models.conversion import source_of
from fellrec.report.comparison import RuleResult
from fellrec.report.export import write_users
from fellrec.report.files import write_run_report
from fellrec.report.stored import is_finished, read_result, write_finished
from fellrec.report.tables import display_name
from fellrec.state.files import explaining_full_disks, make_folder, private_files
from fellrec.state.lock import hold
from fellrec.state.tensor_store import StoredTensors
from fellrec.terminal import tell
from fellrec.tracking.headline import headline
from fellrec.tracking.run_log import NewRun, RunLog, open_log


class Run:
    """One federated run with its directory and its MLflow run.

    Args:
        config: The composed configuration; its ``run_dir`` must be new unless ``resume`` is set.
        recommender: What the runs of a comparison share.
        parent_uid: ``RunLog.uid`` of the run that groups a comparison.
        rule: The rule's name in a comparison, with the settings that vary there; ``None`` for the name alone.
        variant: What tells this run from others of the comparison with the same rule and seed.
        signals: What may ask the run to stop; entered by the command.
        session: The processes of the command; ``None`` if there is one.
        callbacks: Called after those of the configuration.
        folder: Its directory in that of a comparison or a sweep, see ``fellrec.experiment.group``: a run that began
            there is continued, and the result of one that has finished is read. ``None`` for the configuration's.
        series: The runs of the command, for progress.
        command: The words of the command line, for ``command.txt``; empty for a run that has none of its own.
    """

    def __init__(
        self,
        config: DictConfig,
        recommender: Recommender,
        parent_uid: str | None = None,
        rule: str | None = None,
        variant: str = "",
        signals: StopSignals | None = None,
        session: Session | None = None,
        callbacks: Sequence[FederatedCallback] = (),
        folder: Path | None = None,
        series: Series | None = None,
        command: Sequence[str] = (),
    ) -> None:
        self.config = config = config if folder is None else in_group(config, folder)
        self.recommender = recommender
        self.rule = rule or rule_name(config)
        self.variant = variant
        self.label = f"{config.data.name}-{run_name(self.rule, variant, config.seed)}"
        self.title = f"{config.data.name}-{run_name(display_name(self.rule), variant, config.seed)}"
        self.is_in_group = folder is not None
        self.run_dir = self._directory(folder)
        self.parent_uid = parent_uid
        self.signals = signals
        self.session = session
        self.callbacks = callbacks
        self.series = series or Series()
        self.command = command
        self.loop: FederatedLoop | None = None
        self.result: FitResult | None = None

    def execute(self) -> RuleResult:
        """Train, test, and write all results; in a comparison or a sweep, read those of a run that has finished.

        Raises:
            TrainingError: If a client's training diverges; the last checkpoint stays.
            StorageError: If the disk is full or read-only; so it does then.
        """
        with explaining_full_disks(self.run_dir), private_files(), hold(self.run_dir):
            if self.is_in_group and is_finished(self.run_dir):
                return read_result(self.run_dir, self.recommender.data, self.rule, self.variant)
            return self._execute()

    def _directory(self, folder: Path | None) -> Path:
        if folder is not None:
            make_folder(folder)
            return folder.resolve()
        requested = self.config.run_dir
        return Path(requested).resolve() if self.config.resume else new_run_dir(requested, self.label)

    def _execute(self) -> RuleResult:
        config, recommender = self.config, self.recommender
        check_prompt(self.run_dir, recommender.module.objective)
        check_backbone(self.run_dir, recommender.fingerprint, recommender.backbone.name)
        federation = build_federation(config, recommender, self.session)
        if self._has_checkpoint:
            note_versions(self.run_dir)
        else:
            origin = {**recommender.module.objective.metadata, **source_of(recommender.backbone.folder)}
            write_start(self.run_dir, config, recommender.data, origin)
            write_backbone(self.run_dir, recommender.fingerprint)
        if self.command:
            write_command(self.run_dir, self.command)
        log = self._run_log()
        callbacks = self._callbacks(federation, log)
        if self._has_checkpoint:
            for checkpoint in (c for c in callbacks.values() if isinstance(c, Checkpoint)):
                checkpoint.resume()
        last = [Preemption(self.signals)] if self.signals else []
        loop = self.loop = federation.loop([*callbacks.values(), *self.callbacks, *last])
        loop.events.log_metrics = log.log_metrics
        self.series.begin()
        if self.series.number == 1:
            introduce(config, recommender, loop, display_name(self.rule), self.series.num_runs)
        if loop.is_over:
            tell(f"{self.title}: the run is finished, no round is left; it is tested again")
        try:
            result = self.result = loop.run()
        except BaseException as error:
            self._print_how_to_resume(error)
            raise
        meter = next((c for c in callbacks.values() if isinstance(c, CostMeter)), None)
        is_alone = self.session is None and recommender.fabric.device.type == "cpu"
        found = RuleResult(
            rule=self.rule,
            seed=config.seed,
            kind="learned",
            evaluation=result.evaluation,
            seconds_per_round=None if meter is None else meter.seconds_per_round,
            total_seconds=None if meter is None else meter.total_seconds,
            peak_memory_bytes=peak_bytes(),
            best_round=result.best_round,
            validation=result.best_value,
            run_id=log.run_id,
            variant=self.variant,
            cost=None if meter is None else meter.cost,
            cpu_seconds_per_round=meter.rounds.cpu_seconds_per_round if meter is not None and is_alone else None,
        )
        write_run_report(self.run_dir, self.title, result.evaluation, self._about(result))
        write_finished(self.run_dir, found)
        return found

    def _about(self, result: FitResult) -> list[str]:
        """What the run was, for its report."""
        data, backbone = self.recommender.data, self.recommender.backbone.name
        selected = "the start" if result.best_round < 0 else f"round {result.best_round}"
        return [
            f"rule: {display_name(self.rule)}{f', {self.variant}' if self.variant else ''}; seed {self.config.seed}",
            f"data: {data.name}, {data.num_clients} clients, {len(data.catalogue)} items; backbone: {backbone}",
            f"rounds: {result.num_rounds}, counted from 0; tested: {selected}, with {self.config.trainer.metric} "
            f"{result.best_value:.4f} on validation, mean over clients",
            *(
                f"privacy of each {given['unit']}'s data: ε={given['epsilon']:.4g} with δ={given['delta']:g} for the "
                f"models of all rounds; neighbours: {given['neighbours']}"
                for given in self._privacy.values()
            ),
        ]

    def _callbacks(self, federation: Federation, log: RunLog) -> dict[str, FederatedCallback]:
        """The callbacks of the configuration, by name, each with those of the offered objects that it names."""
        config, recommender = self.config, self.recommender
        parts = {**federation.persisted}
        offered: dict[str, Any] = {
            "config": config,
            "data": recommender.data,
            "datamodule": recommender.datamodule,
            "fabric": recommender.fabric,
            "federation": federation,
            "layers": federation.exchange.layers,
            "ledger": federation.ledger,
            "log": log,
            "module": recommender.module,
            "population": federation.population,
            "parts": parts,
            "recommender": recommender,
            "run_dir": self.run_dir,
            "title": self.title,
            "short_title": run_name(display_name(self.rule), self.variant, config.seed),
            "series": self.series,
            "metric": config.trainer.metric,
            "params": as_dict(config),
            "seed": config.seed,
            "dataset": dataset_of(config, recommender.data),
            "max_logged_clients": config.tracking.max_logged_clients,
            "transport": config.split.transport,
            "storage": lambda: storage_of(config, recommender),
            "heads": heads_of(config, recommender),
            "write_results": self._write_results,
            "save_adapter": self._save_adapter,
            "write_model": self._write_model,
            "is_tracked": store_of(config) is not None,
            "register": config.tracking.register_model,
            "every": config.trainer.checkpoint_every,
            "keep": config.trainer.checkpoints_kept,
            "cohort_size": federation.participation.num_aggregated * len(federation.population.rows_of(0)),
        }
        callbacks: dict[str, FederatedCallback] = {}
        for name, node in config.callbacks.items():
            if node is None:
                continue
            callback = instantiate(node, f"callbacks.{name}", offered, of=FederatedCallback)
            callbacks[str(name)] = offered[str(name)] = callback
        parts["callbacks"] = _States(callbacks)
        return callbacks

    @property
    def _has_checkpoint(self) -> bool:
        """A run that is resumed without a checkpoint was stopped before its first: it starts again."""
        return any((self.run_dir / "checkpoints").glob("round_*"))

    def _print_how_to_resume(self, error: BaseException) -> None:
        if self._has_checkpoint and not self.is_in_group:
            what = "interrupted" if isinstance(error, KeyboardInterrupt) else "stopped"
            sys.stderr.write(f"\n{what}; resume the run by: fellrec train resume={self.run_dir}\n")

    def _write_results(self, result: FitResult, more: Mapping[str, Any]) -> None:
        evaluation, recommender = result.evaluation, self.recommender
        assert evaluation.first_items is not None
        about = {
            "rule": self.rule,
            "seed": self.config.seed,
            "num_users": len(evaluation.users),
            "cold": recommender.cold.counts(evaluation.users.numpy()),
            "num_tied_users": int(evaluation.first_items.is_tied.sum()),
            **self._privacy,
            **more,
        }
        write_evaluation(self.run_dir, evaluation, about)
        write_users(self.run_dir, evaluation, recommender.data, recommender.cold)

    @property
    def _privacy(self) -> dict[str, Any]:
        """What the run guarantees; empty if nothing is protected."""
        private = None if self.loop is None else self.loop.exchange.privacy
        return {} if private is None else {"privacy": private.report()}

    def _save_adapter(self, tensors: Mapping[str, Tensor], base: tuple[StoredTensors, ...], folder: Path) -> None:
        """Write an adapter for other tools; beside it the base that it belongs to, if the rule has changed it."""
        recommender = self.recommender
        recommender.adapter.save(tensors, recommender.backbone, lambda: self._frozen(base), folder)
        if base:
            changed = folder.with_name(f"base_{len(base):02d}")
            if not changed.exists():
                save_base(self._frozen(base), recommender.backbone, changed)
            name_base(folder, changed)

    def _write_model(self, result: FitResult, folder: Path) -> str | None:
        """Write the MLflow model of the run; says why if it cannot be served without the run."""
        if (why := why_not(self.config, self.recommender.data)) is None:
            save_pyfunc(folder, self.config, self.recommender, result)
        return why

    def _frozen(self, base: tuple[StoredTensors, ...]) -> dict[str, Tensor]:
        """The frozen weights with some changes of the base."""
        recommender = self.recommender
        recommender.base.use(())
        if recommender.server is not None:
            recommender.server.base.use(())
        plain = [StoredTensors({plain_name(key): t for key, t in change.tensors().items()}) for change in base]
        return with_changes(frozen_parameters(recommender), plain)

    def _run_log(self) -> RunLog:
        config, data = self.config, self.recommender.data
        tags = {
            "kind": "run",
            "rule": self.rule,
            "seed": str(config.seed),
            **common_tags(config, data, self.recommender.backbone.name),
            **({"variant": self.variant} if self.variant else {}),
            **({"comparison": self.run_dir.parent.name} if self.parent_uid else {}),
            **self.recommender.module.objective.metadata,
            **provenance().to_dict(),
        }
        clients = f"{data.num_clients} client{'' if data.num_clients == 1 else 's'}"
        name = " ".join(part for part in (display_name(self.rule), self.variant) if part)
        title = f"{name} · {clients} · seed {config.seed}"
        new = NewRun(store_of(config), config.tracking.experiment, title, tags, self.parent_uid)
        is_shown = headline(config.trainer.metric) if config.tracking.metrics == "headline" else lambda name: True
        return open_log(self.run_dir, new, is_shown)


def check_alone(config: DictConfig) -> Fabric:
    """The Fabric of a run in this process alone.

    Raises:
        ConfigError: If the configuration needs several processes.
    """
    fabric = build_fabric(config)
    if fabric.world_size > 1:
        raise ConfigError(f"one process cannot be {fabric.world_size}; start several by fellrec train")
    check_processes(config, 1)
    return fabric


def build(
    config: DictConfig,
    callbacks: Sequence[FederatedCallback] = (),
    signals: StopSignals | None = None,
    session: Session | None = None,
    folder: Path | None = None,
    command: Sequence[str] = (),
) -> Run:
    """Load data and model of one run.

    Args:
        config: The composed configuration.
        callbacks: Called after those of the configuration; not stored in the configuration of the run.
        signals: What may ask the run to stop.
        session: The processes of the command; ``None`` for this process alone.
        folder: See `Run`.
        command: See `Run`.

    Raises:
        ConfigError: If the configuration needs several processes and there is no ``session``, or ``run_dir`` exists.
        DataError: If the data cannot be used.
    """
    if session is None:
        config = without_launcher(config)
        fabric = check_alone(config)
    else:
        fabric = session.fabric
    begun = folder or (Path(config.run_dir) if config.resume else None)
    if config.run_dir and begun is None:
        check_new(Path(config.run_dir))
    check_store(config)
    check_classes(config)
    if not config.resume:
        check_transforms([config])
    data = build_data(config)
    if begun is not None and (begun / "data.json").is_file():
        check_same_data(begun, data)
    log_notes(config, data)
    build_privacy(config, data.num_clients)  # a budget that cannot be kept is refused before a model is loaded
    config = choose([config], data)[0]
    recommender = build_recommender(config, data, fabric)
    return Run(
        config, recommender, signals=signals, session=session, callbacks=callbacks, folder=folder, command=command
    )


class _States:
    """The states of all callbacks as one part of the checkpoint.

    Args:
        callbacks: By name.
    """

    def __init__(self, callbacks: Mapping[str, FederatedCallback]) -> None:
        self.callbacks = callbacks

    def state_dict(self) -> dict[str, Any]:
        """See ``Persisted``."""
        return {name: state for name, callback in self.callbacks.items() if (state := callback.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Persisted``."""
        for name, callback in self.callbacks.items():
            if name in state:
                callback.load_state_dict(state[name])
