"""``fellrec compare``: several rules and their settings, seeds and cuts on one partition, one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from fellrec.data.prepared import PreparedData
from fellrec.experiment import Recommender, build_data, build_loop, build_recommender, build_rule, recommender_key
from fellrec.experiment.run import Run, collect, finish_message, reference_results, table_cutoff
from fellrec.experiment.run_dir import check_new, new_run_dir
from fellrec.experiment.session import Ranks, processes_to_start, run_ranks
from fellrec.experiment.variants import Label, check_comparable, configurations, labels
from fellrec.launch.local import other_ranks
from fellrec.report.comparison import Comparison, RuleResult
from fellrec.report.cost_tables import COSTS, cost_panels, print_cost, write_cost
from fellrec.report.plots import client_dots, panels, save_png
from fellrec.report.significance import print_significance, with_significance, write_significance
from fellrec.report.tables import display_name, print_comparison, results_console, write_tables
from fellrec.state.files import write_json
from fellrec.tracking.run_log import NewRun, RunLog, parent_run
from fellrec.tracking.store import check_reachable

_SHOWN = ("mean", "pooled", "variance", "worst")


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    configs = configurations(options.overrides, options.run or ())
    if options.show_config:
        sys.stdout.write("---\n".join(OmegaConf.to_yaml(config) for config in configs))
        return

    def lead(ranks: Ranks | None) -> None:
        _report(*compare(configs, ranks), configs[0], options.format)

    with other_ranks(processes_to_start(configs[0]), options.arguments):
        run_ranks(configs[0], lead)


def _report(comparison: Comparison, run_dir: Path, config: DictConfig, output_format: str) -> None:
    if output_format == "json":
        sys.stdout.write(json.dumps(comparison.to_dict(), indent=1) + "\n")
        return
    console = results_console()
    print_comparison(comparison, console, table_cutoff(config))
    print_significance(comparison, console, table_cutoff(config))
    if comparison.variants:
        print_cost(comparison, console, table_cutoff(config))
    console.print(finish_message(run_dir, config), highlight=False)


def compare(configs: Sequence[DictConfig], ranks: Ranks | None = None) -> tuple[Comparison, Path]:
    """Run every configuration and collect the results.

    Args:
        configs: One per rule, setting, seed and cut; data, partition and backbone are the same in all.
        ranks: All processes, if there are several.

    Returns:
        The results, and the directory that holds every run.

    Raises:
        ConfigError: If the configurations differ in more than `check_comparable` allows.
    """
    check_comparable(configs)
    for config in configs:
        build_rule(config)  # a rule that cannot be built must not be found out an hour later
    first = configs[0]
    if first.run_dir:
        check_new(Path(first.run_dir))
    check_reachable(first.tracking.uri, may_be_away=first.tracking.on_unreachable == "keep")
    data = build_data(first)
    recommenders = _Recommenders(data, ranks)
    recommenders.of(first)
    run_dir = new_run_dir(first.run_dir, f"{first.data.name}-compare")
    tags = {"data": data.name, "kind": "comparison"}
    new = NewRun(first.tracking.uri, first.tracking.experiment, run_dir.name, tags)
    with parent_run(run_dir, new) as log:
        learned = [
            _one(config, label, recommenders, run_dir, log.uid)
            for config, label in zip(configs, labels(configs), strict=True)
        ]
        recommender = recommenders.of(first)
        references = reference_results(first, recommender, build_loop(first, recommender, ()))
        collected = collect(recommenders.of(first), [*learned, *references])
        comparison = with_significance(collected, table_cutoff(first))
        write_outputs(comparison, run_dir, table_cutoff(first))
        log.log_artifact(run_dir / "comparison")
        log_figures(log, comparison, table_cutoff(first))
    return comparison, run_dir


def write_outputs(comparison: Comparison, run_dir: Path, cutoff: int) -> None:
    """Write the table, the JSON and the figure into ``run_dir/comparison``."""
    folder = run_dir / "comparison"
    folder.mkdir(exist_ok=True)
    write_tables(comparison, folder, cutoff)
    write_significance(comparison, folder)
    write_json(folder / "comparison.json", comparison.to_dict())
    metric = f"ndcg_at_{cutoff}"
    dots = {
        display_name(rule): torch.stack([r.evaluation.per_client[metric] for r in comparison.of_rule(rule)])
        .mean(dim=0)
        .tolist()
        for rule in comparison.rules("learned")
    }
    references = {
        display_name(rule): comparison.mean_and_sd(rule, f"{metric}/mean")[0] for rule in comparison.rules("reference")
    }
    save_png(client_dots(dots, f"NDCG@{cutoff}", references), folder / "clients.png")
    if comparison.variants:
        write_cost(comparison, folder, cutoff)
        save_png(panels(*cost_panels(comparison, cutoff)), folder / "cost.png")


def log_figures(log: RunLog, comparison: Comparison, cutoff: int) -> None:
    """Log every rule's main figures to the parent run: its line in the UI is the table, before it is unfolded."""
    figures = [f"{metric}_at_{cutoff}/{figure}" for metric in ("ndcg", "recall") for figure in _SHOWN]
    lines = [*comparison.rules("learned"), *comparison.rules("reference")]
    metrics = {
        f"{figure}/{_metric_name(line)}": comparison.mean_and_sd(line, figure)[0]
        for figure in figures
        for line in lines
    }
    for name, figure in COSTS.items() if comparison.variants else ():
        costs = {line: comparison.cost(line, figure) for line in comparison.rules("learned")}
        metrics |= {f"{name}/{_metric_name(line)}": value for line, value in costs.items() if value is not None}
    log.log_metrics(metrics, step=0, once="comparison")


def _metric_name(rule: str) -> str:
    """MLflow's names have no equals sign: ``fedavg/head_layers_2``."""
    return rule.replace(" ", "/").replace("=", "_")


class _Recommenders:
    """One recommender at a time, shared by all runs that differ in their rule only."""

    def __init__(self, data: PreparedData, ranks: Ranks | None) -> None:
        self._data = data
        self._ranks = ranks
        self._current: tuple[str, Recommender] | None = None

    def of(self, config: DictConfig) -> Recommender:
        """The recommender of a configuration; the backbone is loaded again only if something but the rule changed."""
        key = recommender_key(config)
        if self._current is None or self._current[0] != key:
            self._current = None  # the old backbone goes before the new one comes
            make = build_recommender if self._ranks is None else self._ranks.lead
            self._current = (key, make(config, self._data))
        return self._current[1]


def _one(config: DictConfig, label: Label, recommenders: _Recommenders, run_dir: Path, parent_uid: str) -> RuleResult:
    own = OmegaConf.merge(config, {"run_dir": str(run_dir / label.name)})
    assert isinstance(own, DictConfig)
    return Run(own, recommenders.of(config), parent_uid, label.rule, label.variant).execute()
