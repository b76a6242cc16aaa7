"""``fellrec train``: one federated run, or a Hydra multirun over several."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fellrec.cli.arguments import add_format, add_multirun, add_overrides, add_show_config, add_trust
from fellrec.errors import ConfigError
from fellrec.functional.secrets import VARIABLE, reveal
from fellrec.launch.preemption import StopSignals
from fellrec.state.run_folder import CONFIG, which_run

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fellrec.experiment.session import Session

PURPOSE = "one federated run (-m: a Hydra multirun over comma-separated values)"
EXAMPLES = (
    "fellrec train aggregation=fedavg trainer.num_rounds=3",
    "fellrec train data=ml_100k data.root=ml-100k backbone=hf backbone.path=MODEL_FOLDER",
    "fellrec train -m aggregation=fedavg,fellrec aggregation.alpha=0.3,0.7",
    "fellrec train resume=runs/RUN",
    "fellrec train resume=runs/RUN data.root=/elsewhere/ml-1m",
)

_PROCESSES = ("trainer.devices", "trainer.num_nodes")
"""Settings that a resumed run may change: they do not change the result."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_overrides(parser)
    add_format(parser)
    add_multirun(parser)
    add_show_config(parser)
    add_trust(parser)


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    from omegaconf import OmegaConf

    from fellrec.config.compose import compose

    if options.multirun:
        _multirun(options.overrides, options.format, options.show_config)
        return
    run_dir = resume_dir(options.overrides)
    config = compose(options.overrides) if run_dir is None else resumed(options.overrides, run_dir, options.trust)
    if options.show_config:
        sys.stdout.write(OmegaConf.to_yaml(config))
        return
    train(config, _print_json if options.format == "json" else None)


def train(config: DictConfig, take_results: Callable[[dict[str, Any]], None] | None = None) -> None:
    """One run from a composed configuration: data, backbone, rounds, test, table.

    Args:
        config: The composed configuration.
        take_results: Given the results as JSON-ready values; ``None`` prints a table.
    """
    from fellrec.config.compose import check_limits, without_launcher

    check_limits([config])
    from fellrec.experiment.classes import check_classes, check_transforms
    from fellrec.experiment.run_dir import check_new
    from fellrec.experiment.session import run_processes
    from fellrec.state.lock import check_free

    with StopSignals() as signals:
        config = without_launcher(config)
        if config.resume:
            check_free(Path(config.run_dir))
        elif config.run_dir:
            check_new(Path(config.run_dir))
        check_classes(config)  # before other processes are started
        if not config.resume:
            check_transforms([config])
        run_processes([config], lambda session: _train(config, take_results, signals, session))


def _print_json(results: Any) -> None:
    sys.stdout.write(json.dumps(results, indent=1) + "\n")


def _train(
    config: DictConfig,
    take_results: Callable[[dict[str, Any]], None] | None,
    signals: StopSignals,
    session: Session | None,
) -> None:
    from fellrec.experiment.names import table_cutoff
    from fellrec.experiment.run import build, collect, failure_message, reference_results
    from fellrec.experiment.store import finish_message
    from fellrec.report.cost_tables import print_run_cost
    from fellrec.report.tables import print_comparison, results_console

    run = build(config, signals=signals, session=session)
    result = run.execute()
    assert run.loop is not None
    assert run.result is not None
    references = reference_results(config, run.recommender, run.loop)
    comparison = collect(run.recommender, [result, *references], run.run_dir)
    if take_results is not None:
        take_results(comparison.to_dict())
        return
    console = results_console()
    print_comparison(comparison, console, table_cutoff(config))
    if missing := failure_message(run.result):
        console.print(missing, style="yellow", highlight=False)
    if result.cost is not None and config.split.transport != "none":
        print_run_cost(result.cost, console)
    console.print(finish_message(run.run_dir, config), highlight=False, markup=False)


def resume_dir(overrides: Sequence[str]) -> Path | None:
    """The directory given by ``resume=``, verbatim: Hydra's grammar does not allow every path."""
    given = [item.removeprefix("resume=") for item in overrides if item.startswith("resume=")]
    return Path(given[-1]) if given and given[-1] not in ("", "null") else None


def resumed(overrides: Sequence[str], run_dir: Path, trusted: Collection[str] = ()) -> DictConfig:
    """The configuration of a run that is resumed.

    Args:
        overrides: Hydra overrides; only ``resume``, ``tracking.uri``, the number of processes and the places of files
            are allowed.
        run_dir: The run's directory.
        trusted: Classes that are not of fellrec and may be used.

    Raises:
        ConfigError: If it is not the directory of a run, or there are other overrides.
    """
    from fellrec.config.stored import PLACES, moved, read_config

    if not (run_dir / CONFIG).is_file():
        raise ConfigError(f"resume={run_dir}: no {CONFIG} there; {which_run(run_dir)}")
    others = [item for item in overrides if not item.startswith(("resume=", "tracking.uri="))]
    config = moved(read_config(run_dir, trusted), others, (*_PROCESSES, *PLACES, "tracking.uri"))
    config.tracking.uri = _store(overrides, run_dir, config)
    config.run_dir, config.resume = str(run_dir), str(run_dir)
    return config


def _store(overrides: Sequence[str], run_dir: Path, config: DictConfig) -> str | None:
    """Where a resumed run is tracked: in the store of ``tracking.uri=``, or in its own if the user has named that.

    Raises:
        ConfigError: If the user has not.
    """
    from fellrec.config.compose import compose
    from fellrec.experiment.store import store_of
    from fellrec.tracking.known import confirm
    from fellrec.tracking.run_log import store_of_run

    if given := [item for item in overrides if item.startswith("tracking.uri=")]:
        uri: str | None = compose(given).tracking.uri
    else:
        named = store_of(config)
        uri = None if named is None else store_of_run(run_dir, named)
        if uri is not None:
            confirm(uri, run_dir, f"tracking.uri={uri}")
    return uri


def _multirun(overrides: Sequence[str], output_format: str, show_config: bool) -> None:
    """Check every combination first, then let Hydra run them with the launcher that is configured."""
    import hydra
    from omegaconf import OmegaConf

    from fellrec.config.compose import check_limits, compose
    from fellrec.config.paths import conf_dir
    from fellrec.config.sweep import expand, sweeps, without_passwords

    combinations = expand(overrides := without_passwords(overrides))
    if show_config:
        sys.stdout.write("---\n".join(OmegaConf.to_yaml(compose(combination)) for combination in combinations))
        return
    launchers = [item for item in overrides if item.startswith("hydra/launcher=") and item != "hydra/launcher=basic"]
    if output_format == "json" and launchers:
        raise ConfigError(f"--format json is not allowed with {launchers[-1]}: its runs are in other processes")
    check_limits(configs := [compose(combination) for combination in combinations])
    from fellrec.experiment.run_dir import check_new  # imports torch: not before a mistake is found

    for combination, config in zip(combinations, configs, strict=True):
        trainer, uri = config.trainer, config.tracking.uri
        if uri is not None and reveal(uri) != uri:
            os.environ[VARIABLE] = reveal(uri)  # for launchers that start processes
        if _is_folder_of_sweep(combination):
            check_new(Path(config.run_dir))
        if trainer.devices != 1 or trainer.num_nodes != 1:
            raise ConfigError("-m needs trainer.devices=1; start runs with several processes one by one")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors, and the CLI reports them
    logging.getLogger("hydra").setLevel(logging.INFO)  # which run is next
    decorate: Callable[[Any], Any] = hydra.main(str(conf_dir()), "config", version_base="1.3")
    found: list[dict[str, Any]] = []
    train_one = partial(_train_one, take_results=found.append) if output_format == "json" else _train_one
    for sweep in sweeps(overrides):
        sys.argv = ["fellrec train", "--multirun", *sweep]
        decorate(train_one)()
    if output_format == "json":
        _print_json(found)


def _train_one(config: DictConfig, take_results: Callable[[dict[str, Any]], None] | None = None) -> None:
    """One run of a multirun; Hydra's own composition of it is not checked."""
    from hydra.core.hydra_config import HydraConfig

    from fellrec.config.compose import compose
    from fellrec.experiment.names import rule_name

    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    config = compose(overrides)
    if _is_folder_of_sweep(overrides):
        name = f"{int(hydra.job.num):03d}-{rule_name(config)}-s{config.seed}"
        config.run_dir = str(Path(config.run_dir) / name)
    train(config, take_results)


def _is_folder_of_sweep(overrides: Sequence[str]) -> bool:
    """Whether ``run_dir`` is for all runs of a multirun; one with an interpolation names a directory for each."""
    given = [item for item in overrides if item.startswith("run_dir=")]
    return bool(given) and "${" not in given[-1] and given[-1] != "run_dir=null"
