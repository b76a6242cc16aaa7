"""``fellrec train``: one federated run, or a Hydra multirun over several."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fellrec.config.compose import check, compose, read_config, without_launcher
from fellrec.config.paths import conf_dir
from fellrec.config.sweep import expand, sweeps
from fellrec.errors import ConfigError
from fellrec.experiment import build_data, build_recommender, build_rule, over_ranks
from fellrec.experiment.roles import Team, run_role
from fellrec.experiment.run import Run, absence_message, collect, finish_message, reference_results, table_cutoff
from fellrec.experiment.run_dir import check_new
from fellrec.experiment.session import Ranks, processes_to_start, run_ranks
from fellrec.launch.local import other_ranks
from fellrec.launch.preemption import StopSignals
from fellrec.report.cost_tables import print_run_cost
from fellrec.report.tables import print_comparison, results_console
from fellrec.state.lock import check_free
from fellrec.tracking.store import check_reachable

_RANKS = ("trainer.devices=", "trainer.num_nodes=")
"""Settings that a resumed run may change: they change no result."""


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    if options.multirun:
        _multirun(options.overrides)
        return
    run_dir = resume_dir(options.overrides)
    config = compose(options.overrides) if run_dir is None else resumed(options.overrides, run_dir)
    if options.show_config:
        sys.stdout.write(OmegaConf.to_yaml(config))
        return
    with other_ranks(processes_to_start(config), options.arguments):
        train(config, options.format)


def train(config: DictConfig, output_format: str = "table") -> None:
    """One run from a composed configuration: data, backbone, rounds, test, table.

    Args:
        config: The composed configuration.
        output_format: ``"table"`` or ``"json"``.
    """
    with StopSignals() as signals:
        config = without_launcher(config)
        if config.resume:
            check_free(Path(config.run_dir))
        elif config.run_dir:
            check_new(Path(config.run_dir))
        build_rule(config)  # a mistake in it must show before the backbone is loaded
        if config.split.transport == "distributed":
            run_role(config, lambda team: _train(config, output_format, signals, team))
        else:
            run_ranks(config, lambda ranks: _train(config, output_format, signals, ranks))


def _train(config: DictConfig, output_format: str, signals: StopSignals, team: Team | Ranks | None = None) -> None:
    check_reachable(config.tracking.uri, may_be_away=bool(config.resume) or config.tracking.on_unreachable == "keep")
    data = build_data(config)
    recommender = build_recommender(config, data) if team is None else team.lead(config, data)
    run = Run(config, recommender, signals=signals)
    result = run.execute()
    assert run.loop is not None
    comparison = collect(recommender, [result, *reference_results(config, recommender, run.loop)])
    run.loop.execution.stop()
    if output_format == "json":
        sys.stdout.write(json.dumps(comparison.to_dict(), indent=1) + "\n")
        return
    console = results_console()
    print_comparison(comparison, console, table_cutoff(config))
    if missing := absence_message(run.loop):
        console.print(missing, style="yellow", highlight=False)
    if result.cost is not None and config.split.transport != "none":
        print_run_cost(result.cost, console)
    console.print(finish_message(run.run_dir, config), highlight=False)


def resume_dir(overrides: Sequence[str]) -> Path | None:
    """The folder that ``resume=`` names, as it is: a path need not be what Hydra would read."""
    given = [item.removeprefix("resume=") for item in overrides if item.startswith("resume=")]
    return Path(given[-1]) if given and given[-1] not in ("", "null") else None


def resumed(overrides: Sequence[str], run_dir: Path) -> DictConfig:
    """The configuration of a run that goes on.

    Args:
        overrides: What was given; nothing but ``resume`` is allowed.
        run_dir: The run's directory.

    Raises:
        ConfigError: If it is no run's directory, or there are other overrides.
    """
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"resume={run_dir}: no config.yaml there; give the directory of a run")
    others = [item for item in overrides if not item.startswith(("resume=", *_RANKS))]
    if others:
        raise ConfigError(f"resume goes on with the run's own configuration; leave out {' '.join(others)}")
    config = read_config(run_dir)
    config.merge_with_dotlist([item for item in overrides if item.startswith(_RANKS)])
    check(config)
    config.run_dir, config.resume = str(run_dir), str(run_dir)
    return config


def _multirun(overrides: Sequence[str]) -> None:
    """Check every combination first, then let Hydra run them with the launcher that is configured."""
    import hydra

    for combination in expand(overrides):
        if over_ranks(compose(combination)):
            raise ConfigError("-m runs in one process, and trainer.devices=1; start runs over several ranks one by one")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come back to the CLI, which phrases them
    decorate: Callable[[Any], Any] = hydra.main(str(conf_dir()), "config", version_base="1.3")
    for sweep in sweeps(overrides):
        sys.argv = ["fellrec train", "--multirun", *sweep]
        decorate(_train_one)()


def _train_one(config: DictConfig) -> None:
    """One run of a multirun; Hydra's own composition of it is not checked."""
    from hydra.core.hydra_config import HydraConfig

    train(compose(list(HydraConfig.get().overrides.task)))
