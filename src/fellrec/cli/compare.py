"""``fellrec compare``: several rules and their settings, seeds and cuts on one partition, one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fellrec.cli.arguments import add_format, add_overrides, add_show_config, add_trust
from fellrec.errors import ConfigError
from fellrec.launch.preemption import StopSignals
from fellrec.terminal import tell

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fellrec.data.prepared import PreparedData
    from fellrec.experiment.build import Recommender
    from fellrec.experiment.session import Session
    from fellrec.experiment.variants import Label
    from fellrec.federated.kept import KeptUsers
    from fellrec.report.comparison import Comparison

PURPOSE = "several rules and seeds on one partition, in one table with the non-learned baselines"
EXAMPLES = (
    "fellrec compare",
    "fellrec compare data=ml_1m data.root=ml-1m aggregation=local,fedavg,fellrec,centralized seed=0,1,2",
    "fellrec compare experiment=ml_1m_small data.root=ml-1m --format json",
    "fellrec compare aggregation=fedavg,fellrec trainer.learning_rate=1e-3,2e-3",
    "fellrec compare --run 'aggregation=fedavg trainer.learning_rate=2e-3' --run 'aggregation=fellrec'",
    "fellrec compare resume=runs/COMPARISON",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_overrides(parser)
    add_format(parser)
    parser.add_argument(
        "--run",
        action="append",
        metavar="OVERRIDES",
        help="overrides of one rule, in quotes, combined with the other overrides; may be repeated",
    )
    add_show_config(parser)
    add_trust(parser)


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    from omegaconf import OmegaConf

    from fellrec.config.compose import check_limits
    from fellrec.config.data_files import check_data_files
    from fellrec.experiment.resume import resume_dir
    from fellrec.experiment.variants import check_comparable

    folder = resume_dir(options.overrides)
    configs = _configurations(options, folder)
    if options.show_config:
        sys.stdout.write("---\n".join(OmegaConf.to_yaml(config) for config in configs))
        return

    check_comparable(configs)
    check_limits(configs)
    check_data_files(configs)
    from fellrec.experiment.session import run_processes

    with StopSignals() as signals:
        run_processes(
            configs,
            lambda session: _report(
                *compare(configs, session, folder, signals, options.arguments), configs[0], options.format
            ),
        )


def _configurations(options: argparse.Namespace, folder: Path | None) -> list[DictConfig]:
    """The configurations of a new comparison, or of the one in ``folder``."""
    from fellrec.config.compose import without_launcher
    from fellrec.experiment.resume import resumed_group
    from fellrec.experiment.variants import configurations

    if folder is None:
        return configurations(options.overrides, options.run or ())
    if options.run:
        raise ConfigError(f"--run is not allowed with resume={folder}: a comparison keeps its own runs; leave it out")
    return list(map(without_launcher, resumed_group(options.overrides, folder, "comparison", options.trust).values()))


def _report(comparison: Comparison, run_dir: Path, config: DictConfig, output_format: str) -> None:
    from fellrec.experiment.names import table_cutoff
    from fellrec.experiment.store import finish_message
    from fellrec.report.cost_tables import print_cost
    from fellrec.report.main_table import print_comparison
    from fellrec.report.reachable import print_shares
    from fellrec.report.significance import print_significance
    from fellrec.report.tables import results_console

    if output_format == "json":
        sys.stdout.write(json.dumps(_plain(comparison, table_cutoff(config)), indent=1) + "\n")
        return
    console = results_console()
    print_comparison(comparison, console, table_cutoff(config))
    print_significance(comparison, console, table_cutoff(config))
    print_shares(comparison, console, table_cutoff(config))
    if comparison.variants:
        print_cost(comparison, console, table_cutoff(config))
    console.print(finish_message(run_dir, config), highlight=False, markup=False)


def compare(
    configs: Sequence[DictConfig],
    session: Session | None = None,
    folder: Path | None = None,
    signals: StopSignals | None = None,
    command: Sequence[str] = (),
) -> tuple[Comparison, Path]:
    """Run every configuration and collect the results.

    Args:
        configs: One per rule, setting, seed and cut; see `check_comparable` for what must be the same in all.
        session: The processes of the command; ``None`` if there is one.
        folder: The directory of a comparison that is resumed: finished runs are kept, begun ones continued.
        signals: What may ask a run to stop.
        command: The words of the command line, for ``command.txt``.

    Returns:
        The results, and the directory that holds every run.

    Raises:
        ConfigError: If a rule's settings are not allowed, or the data changed since the comparison began.
    """
    from fellrec.experiment.auto import choose
    from fellrec.experiment.build import build_data, log_notes
    from fellrec.experiment.classes import check_classes, check_transforms
    from fellrec.experiment.group import advising
    from fellrec.experiment.privacy import build_privacy
    from fellrec.experiment.run_dir import check_new, check_same_data, note_versions, write_command
    from fellrec.experiment.store import check_store
    from fellrec.experiment.variants import labels
    from fellrec.state.lock import check_free, hold

    for config in configs:
        check_classes(config)  # report errors of every rule before the first run starts
    first = configs[0]
    if folder is not None:
        check_free(folder)
    else:
        check_transforms(configs)
        if first.run_dir:
            check_new(Path(first.run_dir))
    check_store(first)
    data = build_data(first)
    log_notes(first, data)
    for config in configs:
        build_privacy(config, data.num_clients)  # a budget that cannot be kept is refused before a model is loaded
    if folder is not None:
        check_same_data(folder, data)
    configs = choose(configs, data)
    recommenders = _Recommenders(data, session)
    recommenders.of(configs[0])
    runs = dict(zip(labels(configs), configs, strict=True))
    if folder is None:
        run_dir = _new_comparison(runs, data)
    else:
        run_dir = folder.resolve()
        note_versions(run_dir)
    if command:
        write_command(run_dir, command)
    with hold(run_dir), advising(run_dir, "comparison"):
        return _compare(runs, recommenders, run_dir, signals), run_dir


def _new_comparison(runs: Mapping[Label, DictConfig], data: PreparedData) -> Path:
    """Create the directory of a comparison, with one for each run that has its configuration."""
    from fellrec.experiment.group import write_group
    from fellrec.experiment.run_dir import new_run_dir, write_facts

    first = next(iter(runs.values()))
    run_dir = new_run_dir(first.run_dir, f"{first.data.name}-compare")
    write_facts(run_dir, data)
    write_group(run_dir, "comparison", {label.name: config for label, config in runs.items()})
    return run_dir


def _compare(
    runs: Mapping[Label, DictConfig], recommenders: _Recommenders, run_dir: Path, signals: StopSignals | None
) -> Comparison:
    """Make all runs that are not finished, and write the results of all."""
    from fellrec.callbacks.progress import Series
    from fellrec.experiment.federation import build_loop
    from fellrec.experiment.names import table_cutoff
    from fellrec.experiment.parent import dataset_of, log_result, log_settings, parent_of
    from fellrec.experiment.results import collect, reference_results
    from fellrec.experiment.run import Run
    from fellrec.experiment.run_dir import first_command
    from fellrec.report.significance import with_significance
    from fellrec.report.stored import is_finished
    from fellrec.state.files import private_files
    from fellrec.tracking.run_log import parent_run

    labels, configs, session = list(runs), list(runs.values()), recommenders.session
    first, data = configs[0], recommenders.data
    new = parent_of(configs, labels, data, recommenders.of(first).backbone.name, run_dir.name)
    with parent_run(run_dir, new) as log:
        log_settings(log, configs, labels, dataset_of(first, data))
        learned, left = [], [label for label in runs if not is_finished(run_dir / label.name)]
        series = Series(len(left))
        tell(_what(runs, len(left)))
        for label, config in runs.items():
            of_comparison = log.uid or None, label.rule, label.variant, signals, session
            run = Run(config, recommenders.of(config), *of_comparison, folder=run_dir / label.name, series=series)
            learned.append(run.execute())
        recommender = recommenders.of(first)
        references = reference_results(first, recommender, build_loop(first, recommender, session=session))
        collected = collect(recommender, [*learned, *references], run_dir)
        comparison = with_significance(collected, table_cutoff(first))
        with private_files():
            write_outputs(comparison, run_dir, table_cutoff(first))
        log_result(log, comparison, table_cutoff(first), first_command(run_dir))
    return comparison


def _what(runs: Mapping[Label, DictConfig], num_left: int) -> str:
    """What is compared, in one line."""
    from fellrec.report.tables import display_name

    names = ", ".join(dict.fromkeys(" ".join(filter(None, (display_name(r.rule), r.variant))) for r in runs))
    seeds = list(dict.fromkeys(label.seed for label in runs))
    kept = f", {len(runs) - num_left} of them finished" if num_left < len(runs) else ""
    word = "seed" if len(seeds) == 1 else "seeds"
    return f"comparison of {len(runs)} runs{kept}: {names}; {word} {', '.join(map(str, seeds))}"


def write_outputs(comparison: Comparison, run_dir: Path, cutoff: int) -> None:
    """Write the table, the JSON and the figure into ``run_dir/comparison``."""
    import torch

    from fellrec.report.cost_tables import cost_panels, write_cost
    from fellrec.report.files import write_comparison_report
    from fellrec.report.main_table import write_tables
    from fellrec.report.plots import client_dots, frontier, panels, save_png
    from fellrec.report.reachable import write_shares
    from fellrec.report.sections import spread_points
    from fellrec.report.significance import write_significance
    from fellrec.state.files import write_json

    folder = run_dir / "comparison"
    folder.mkdir(exist_ok=True)
    write_tables(comparison, folder, cutoff)
    write_significance(comparison, folder)
    write_shares(comparison, folder, cutoff)
    write_json(folder / "comparison.json", _plain(comparison, cutoff))
    metric = f"ndcg_at_{cutoff}"
    dots = {
        rule: torch.stack([r.evaluation.per_client[metric] for r in comparison.of_rule(rule)]).mean(dim=0).tolist()
        for rule in comparison.rules("learned")
    }
    references = {rule: comparison.mean_and_sd(rule, f"{metric}/mean")[0] for rule in comparison.rules("reference")}
    save_png(client_dots(dots, f"NDCG@{cutoff}", references), folder / "clients.png")
    save_png(frontier(spread_points(comparison, metric), f"NDCG@{cutoff}"), folder / "frontier.png")
    if comparison.variants:
        write_cost(comparison, folder, cutoff)
        save_png(panels(*cost_panels(comparison, cutoff)), folder / "cost.png")
    write_comparison_report(comparison, folder, f"{comparison.data}: {run_dir.name}", cutoff)


def _plain(comparison: Comparison, cutoff: int) -> dict[str, Any]:
    from fellrec.report.reachable import to_dict

    return {**comparison.to_dict(), "reachable": to_dict(comparison, f"ndcg_at_{cutoff}")}


class _Recommenders:
    """One recommender at a time, shared by all runs that differ only in their rule; kept metrics by more of them."""

    def __init__(self, data: PreparedData, session: Session | None) -> None:
        self.data = data
        self.session = session
        self._current: tuple[str, Recommender] | None = None
        self._kept: dict[str, KeptUsers] = {}

    def of(self, config: DictConfig) -> Recommender:
        """The recommender of a configuration; the backbone is loaded again only if more than the rule changed."""
        from fellrec.experiment.build import build_recommender, evaluation_key, recommender_key
        from fellrec.federated.kept import KeptUsers

        key = recommender_key(config)
        if self._current is None or self._current[0] != key:
            self._current = None  # free the old backbone before the new one is loaded
            fabric = None if self.session is None else self.session.fabric
            kept = self._kept.setdefault(evaluation_key(config), KeptUsers())
            self._current = (key, replace(build_recommender(config, self.data, fabric), kept=kept))
        return self._current[1]
