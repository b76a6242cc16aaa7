"""``fellrec train``: one federated run, or a Hydra multirun over several."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fellrec.cli.arguments import add_format, add_multirun, add_overrides, add_show_config, add_trust
from fellrec.errors import ConfigError
from fellrec.functional.secrets import VARIABLE, reveal
from fellrec.launch.preemption import StopSignals
from fellrec.terminal import tell

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fellrec.experiment.session import Session

TakeResults = Callable[[dict[str, Any]], None]

PURPOSE = "one federated run (-m: a Hydra multirun over comma-separated values)"
EXAMPLES = (
    "fellrec train aggregation=fedavg trainer.num_rounds=3",
    "fellrec train data=ml_100k data.root=ml-100k backbone=hf backbone.path=MODEL_FOLDER",
    "fellrec train -m aggregation=fedavg,fellrec aggregation.alpha=0.3,0.7",
    "fellrec train resume=runs/RUN",
    "fellrec train resume=runs/RUN data.root=/elsewhere/ml-1m",
    "fellrec train -m resume=runs/SWEEP",
)


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
    from fellrec.experiment.resume import resume_dir, resumed

    run_dir = resume_dir(options.overrides)
    if options.multirun:
        if run_dir is None:
            _multirun(options)
        else:
            _resume_sweep(options, run_dir)
        return
    config = compose(options.overrides) if run_dir is None else resumed(options.overrides, run_dir, options.trust)
    if options.show_config:
        sys.stdout.write(OmegaConf.to_yaml(config))
        return
    train(config, _print_json if options.format == "json" else None, command=options.arguments)


def train(
    config: DictConfig,
    take_results: TakeResults | None = None,
    folder: Path | None = None,
    command: Sequence[str] = (),
) -> None:
    """One run from a composed configuration: data, backbone, rounds, test, table.

    Args:
        config: The composed configuration.
        take_results: Given the results as JSON-ready values; ``None`` prints a table.
        folder: The run's directory in that of a sweep; a run that began there is continued.
        command: The words of the command line, for ``command.txt``.
    """
    from fellrec.config.compose import check_limits, without_launcher
    from fellrec.config.data_files import check_data_files

    check_limits([config])
    check_data_files([config])
    from fellrec.experiment.classes import check_classes, check_transforms
    from fellrec.experiment.run_dir import check_new
    from fellrec.experiment.session import run_processes
    from fellrec.state.lock import check_free

    with StopSignals() as signals:
        config = without_launcher(config)
        if folder is not None or config.resume:
            check_free(folder or Path(config.run_dir))
        elif config.run_dir:
            check_new(Path(config.run_dir))
        check_classes(config)  # before other processes are started
        if not config.resume:
            check_transforms([config])
        run_processes([config], lambda session: _train(config, take_results, signals, session, folder, command))


def _print_json(results: Any) -> None:
    sys.stdout.write(json.dumps(results, indent=1) + "\n")


def _train(
    config: DictConfig,
    take_results: TakeResults | None,
    signals: StopSignals,
    session: Session | None,
    folder: Path | None,
    command: Sequence[str],
) -> None:
    from fellrec.experiment.federation import build_loop
    from fellrec.experiment.names import table_cutoff
    from fellrec.experiment.results import collect, failure_message, reference_results
    from fellrec.experiment.run import build
    from fellrec.experiment.store import finish_message
    from fellrec.report.cost_tables import print_run_cost
    from fellrec.report.main_table import print_comparison
    from fellrec.report.tables import results_console

    run = build(config, signals=signals, session=session, folder=folder, command=command)
    result = run.execute()
    loop = run.loop or build_loop(config, run.recommender, session=session)  # none if the result was there
    references = reference_results(config, run.recommender, loop)
    comparison = collect(run.recommender, [result, *references], run.run_dir)
    if take_results is not None:
        take_results(comparison.to_dict())
        return
    console = results_console()
    print_comparison(comparison, console, table_cutoff(config))
    if run.result is not None and (missing := failure_message(run.result)):
        console.print(missing, style="yellow", highlight=False)
    if result.cost is not None and (config.split.transport != "none" or config.exchange.secure):
        print_run_cost(result.cost, console)
    console.print(finish_message(run.run_dir, config), highlight=False, markup=False)


def _multirun(options: argparse.Namespace) -> None:
    """Check every combination first, then let Hydra run them with the launcher that is configured.

    All runs are in one directory, unless ``run_dir`` has an interpolation, which names one for each run.
    """
    import hydra
    from omegaconf import OmegaConf

    from fellrec.config.compose import check_limits, compose
    from fellrec.config.data_files import check_data_files
    from fellrec.config.paths import conf_dir
    from fellrec.config.sweep import expand, sweeps, without_passwords
    from fellrec.experiment.group import advising

    overrides = without_passwords(options.overrides)
    launchers = [item for item in overrides if item.startswith("hydra/launcher=") and item != "hydra/launcher=basic"]
    is_json = options.format == "json"
    if is_json and launchers:
        raise ConfigError(f"--format json is not allowed with {launchers[-1]}: its runs are in other processes")
    configs = [compose(combination) for combination in expand(overrides)]
    if options.show_config:
        sys.stdout.write("---\n".join(OmegaConf.to_yaml(config) for config in configs))
        return
    check_limits(configs)
    check_data_files(configs)
    for config in configs:
        trainer, uri = config.trainer, config.tracking.uri
        if uri is not None and reveal(uri) != uri:
            os.environ[VARIABLE] = reveal(uri)  # for launchers that start processes
        if trainer.devices != 1 or trainer.num_nodes != 1:
            raise ConfigError("-m needs trainer.devices=1; start runs with several processes one by one")
    folder = _new_sweep(options, configs)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors, and the CLI reports them
    logging.getLogger("hydra").setLevel(logging.INFO)  # which run is next
    decorate: Callable[[Any], Any] = hydra.main(str(conf_dir()), "config", version_base="1.3")
    found: list[dict[str, Any]] = []
    take, first = found.append if is_json else None, 0
    with nullcontext() if folder is None else advising(folder, "sweep"):
        for sweep in sweeps(overrides):
            sys.argv = ["fellrec train", "--multirun", *sweep]
            decorate(partial(_train_one, take_results=take, folder=folder, first=first))()
            first += len(expand(sweep))
    if is_json:
        _print_json(found)


def _new_sweep(options: argparse.Namespace, configs: Sequence[DictConfig]) -> Path | None:
    """The directory of a sweep, with those of its runs; ``None`` if ``run_dir`` names one for each run."""
    from fellrec.experiment.group import write_group
    from fellrec.experiment.run_dir import new_run_dir, write_command

    given = [item for item in options.overrides if item.startswith("run_dir=")]
    if given and "${" in given[-1]:
        return None
    folder = new_run_dir(configs[0].run_dir, f"{configs[0].data.name}-sweep")
    write_command(folder, options.arguments)
    write_group(folder, "sweep", {_run_name(number, config): config for number, config in enumerate(configs)})
    return folder


def _run_name(number: int, config: DictConfig) -> str:
    from fellrec.experiment.names import rule_name

    return f"{number:03d}-{rule_name(config)}-s{config.seed}"


def _train_one(config: DictConfig, take_results: TakeResults | None, folder: Path | None, first: int) -> None:
    """One run of a multirun; Hydra's own composition of it is not checked."""
    from hydra.core.hydra_config import HydraConfig

    from fellrec.config.compose import compose

    hydra = HydraConfig.get()
    config = compose(list(hydra.overrides.task))
    name = _run_name(first + int(hydra.job.num), config)
    train(config, take_results, None if folder is None else folder / name)


def _resume_sweep(options: argparse.Namespace, folder: Path) -> None:
    """Finished runs of a sweep are kept, begun ones resumed, the others run, one after the other in this process."""
    from omegaconf import OmegaConf

    from fellrec.experiment.group import advising
    from fellrec.experiment.resume import resumed_group
    from fellrec.experiment.run_dir import write_command
    from fellrec.report.stored import is_finished

    configs = resumed_group(options.overrides, folder, "sweep", options.trust)
    if options.show_config:
        sys.stdout.write("---\n".join(OmegaConf.to_yaml(config) for config in configs.values()))
        return
    found: list[dict[str, Any]] = []
    is_json = options.format == "json"
    write_command(folder, options.arguments)
    with advising(folder.absolute(), "sweep"):
        for name, config in configs.items():
            if is_finished(folder / name) and not is_json:
                tell(f"{name}: finished, kept as it is")
            else:
                train(config, found.append if is_json else None, folder / name)
    if is_json:
        _print_json(found)
