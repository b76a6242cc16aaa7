"""``fellrec compare``: several rules and their settings, seeds and cuts on one partition, one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fellrec.cli.arguments import add_format, add_overrides, add_show_config

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fellrec.data.prepared import PreparedData
    from fellrec.experiment.build import Recommender
    from fellrec.experiment.session import Session
    from fellrec.experiment.variants import Label
    from fellrec.federated.kept import KeptUsers
    from fellrec.report.comparison import Comparison, RuleResult

PURPOSE = "several rules and seeds on one partition, in one table with the non-learned baselines"
EXAMPLES = (
    "fellrec compare",
    "fellrec compare data=ml_1m data.root=ml-1m aggregation=local,fedavg,fellrec,centralized seed=0,1,2",
    "fellrec compare experiment=ml_1m_small data.root=ml-1m --format json",
    "fellrec compare aggregation=fedavg,fellrec trainer.learning_rate=1e-3,2e-3",
    "fellrec compare --run 'aggregation=fedavg trainer.learning_rate=2e-3' --run 'aggregation=fellrec'",
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


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    from omegaconf import OmegaConf

    from fellrec.config.compose import check_limits
    from fellrec.experiment.variants import check_comparable, configurations

    configs = configurations(options.overrides, options.run or ())
    if options.show_config:
        sys.stdout.write("---\n".join(OmegaConf.to_yaml(config) for config in configs))
        return

    check_comparable(configs)
    check_limits(configs)
    from fellrec.experiment.session import run_processes

    command = options.arguments
    run_processes(configs, lambda session: _report(*compare(configs, session, command), configs[0], options.format))


def _report(comparison: Comparison, run_dir: Path, config: DictConfig, output_format: str) -> None:
    from fellrec.experiment.names import table_cutoff
    from fellrec.experiment.store import finish_message
    from fellrec.report.cost_tables import print_cost
    from fellrec.report.reachable import print_shares
    from fellrec.report.significance import print_significance
    from fellrec.report.tables import print_comparison, results_console

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
    configs: Sequence[DictConfig], session: Session | None = None, command: Sequence[str] = ()
) -> tuple[Comparison, Path]:
    """Run every configuration and collect the results.

    Args:
        configs: One per rule, setting, seed and cut; see `check_comparable` for what must be the same in all.
        session: The processes of the command; ``None`` if there is one.
        command: Its words after ``fellrec``, for the note in MLflow.

    Returns:
        The results, and the directory that holds every run.

    Raises:
        ConfigError: If a rule's settings are not allowed.
    """
    from fellrec.experiment.auto import choose
    from fellrec.experiment.build import build_data, log_notes
    from fellrec.experiment.classes import check_classes, check_transforms
    from fellrec.experiment.federation import build_loop
    from fellrec.experiment.names import table_cutoff
    from fellrec.experiment.parent import dataset_of, log_result, log_settings, parent_of
    from fellrec.experiment.run import collect, reference_results
    from fellrec.experiment.run_dir import check_new, new_run_dir
    from fellrec.experiment.store import check_store
    from fellrec.experiment.variants import labels
    from fellrec.report.significance import with_significance
    from fellrec.state.files import private_files
    from fellrec.tracking.run_log import parent_run

    for config in configs:
        check_classes(config)  # report errors of every rule before the first run starts
    check_transforms(configs)
    first = configs[0]
    if first.run_dir:
        check_new(Path(first.run_dir))
    check_store(first)
    data = build_data(first)
    log_notes(first, data)
    configs = choose(configs, data)
    first = configs[0]
    recommenders = _Recommenders(data, session)
    backbone = recommenders.of(first).backbone.name
    run_dir = new_run_dir(first.run_dir, f"{first.data.name}-compare")
    names = labels(configs)
    with parent_run(run_dir, parent_of(configs, names, data, backbone, run_dir.name)) as log:
        log_settings(log, configs, names, dataset_of(first, data))
        learned = [
            _one(config, label, recommenders, run_dir, log.uid or None)
            for config, label in zip(configs, names, strict=True)
        ]
        recommender = recommenders.of(first)
        references = reference_results(first, recommender, build_loop(first, recommender, session=session))
        collected = collect(recommenders.of(first), [*learned, *references])
        comparison = with_significance(collected, table_cutoff(first))
        with private_files():
            write_outputs(comparison, run_dir, table_cutoff(first))
        log_result(log, comparison, table_cutoff(first), command)
    return comparison, run_dir


def write_outputs(comparison: Comparison, run_dir: Path, cutoff: int) -> None:
    """Write the table, the JSON and the figure into ``run_dir/comparison``."""
    import torch

    from fellrec.report.cost_tables import cost_panels, write_cost
    from fellrec.report.plots import client_dots, frontier, panels, save_png
    from fellrec.report.reachable import write_shares
    from fellrec.report.sections import spread_points
    from fellrec.report.significance import write_significance
    from fellrec.report.tables import write_tables
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


def _plain(comparison: Comparison, cutoff: int) -> dict[str, Any]:
    from fellrec.report.reachable import to_dict

    return {**comparison.to_dict(), "reachable": to_dict(comparison, f"ndcg_at_{cutoff}")}


class _Recommenders:
    """One recommender at a time, shared by all runs that differ only in their rule; kept metrics by more of them."""

    def __init__(self, data: PreparedData, session: Session | None) -> None:
        self._data = data
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
            self._current = (key, replace(build_recommender(config, self._data, fabric), kept=kept))
        return self._current[1]


def _one(
    config: DictConfig, label: Label, recommenders: _Recommenders, run_dir: Path, parent_uid: str | None
) -> RuleResult:
    from omegaconf import DictConfig, OmegaConf

    from fellrec.experiment.run import Run

    own = OmegaConf.merge(config, {"run_dir": str(run_dir / label.name)})
    assert isinstance(own, DictConfig)
    recommender, session = recommenders.of(config), recommenders.session
    return Run(own, recommender, parent_uid, label.rule, label.variant, session=session).execute()
