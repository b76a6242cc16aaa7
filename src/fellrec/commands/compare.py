"""``fellrec compare``: several rules and seeds on one partition, one table."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from omegaconf import DictConfig, OmegaConf

from fellrec.aggregation.build import build_aggregation
from fellrec.build import Recommender, build_data, build_loop, build_recommender
from fellrec.config import as_dict, compose, expand, without_launcher
from fellrec.data.prepared import PreparedData
from fellrec.errors import ConfigError
from fellrec.functional.nested import flatten
from fellrec.records import check_new, new_run_dir, write_json
from fellrec.runs import Run, collect, finish_message, reference_results, rule_name, table_cutoff
from fellrec.tracking.plots import client_dots, save_png
from fellrec.tracking.results import Comparison, RuleResult
from fellrec.tracking.store import check_reachable, parent_run
from fellrec.tracking.tables import display_name, print_comparison, results_console, write_tables

_SHOWN = ("mean", "pooled", "variance", "worst")
_DEFAULT_RULES = "aggregation=local,fedavg,fellrec,centralized"


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    overrides = list(options.overrides)
    if not any(item.startswith("aggregation=") for item in overrides):
        overrides.append(_DEFAULT_RULES)
    configs = [without_launcher(compose(combination)) for combination in expand(overrides)]
    if options.show_config:
        sys.stdout.write("---\n".join(OmegaConf.to_yaml(config) for config in configs))
        return
    comparison, run_dir = compare(configs)
    if options.format == "json":
        sys.stdout.write(json.dumps(comparison.to_dict(), indent=1) + "\n")
        return
    console = results_console()
    print_comparison(comparison, console, table_cutoff(configs[0]))
    console.print(finish_message(run_dir, configs[0]), highlight=False)


def compare(configs: Sequence[DictConfig]) -> tuple[Comparison, Path]:
    """Run every configuration and collect the results.

    Args:
        configs: One per rule and seed; data, partition and backbone are the same in all.

    Returns:
        The results, and the directory that holds every run.

    Raises:
        ConfigError: If the configurations differ in more than rule and seed.
    """
    _check_comparable(configs)
    for config in configs:
        build_aggregation(config.aggregation)  # a rule that cannot be built must not be found out an hour later
    first = configs[0]
    if first.run_dir:
        check_new(Path(first.run_dir))
    check_reachable(first.tracking.uri)
    data = build_data(first)
    recommenders = _Recommenders(data)
    recommenders.of(first)
    run_dir = new_run_dir(first.run_dir, f"{first.data.name}-compare")
    tags = {"data": data.name, "kind": "comparison"}
    with parent_run(first.tracking.uri, first.tracking.experiment, run_dir.name, tags) as (parent_id, client):
        learned = [_one(config, recommenders, run_dir, parent_id) for config in configs]
        recommender = recommenders.of(first)
        references = reference_results(recommender, build_loop(first, recommender, ()), first.seed)
        comparison = collect(recommenders.of(first), [*learned, *references])
        write_outputs(comparison, run_dir, table_cutoff(first))
        client.log_artifacts(parent_id, str(run_dir / "comparison"))
        log_figures(client, parent_id, comparison, table_cutoff(first))
    return comparison, run_dir


def write_outputs(comparison: Comparison, run_dir: Path, cutoff: int) -> None:
    """Write the table, the JSON and the figure into ``run_dir/comparison``."""
    folder = run_dir / "comparison"
    folder.mkdir(exist_ok=True)
    write_tables(comparison, folder, cutoff)
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


def log_figures(client: MlflowClient, run_id: str, comparison: Comparison, cutoff: int) -> None:
    """Log every rule's main figures to the parent run: its line in the UI is the table, before it is unfolded."""
    now = int(time.time() * 1000)
    figures = [f"{metric}_at_{cutoff}/{figure}" for metric in ("ndcg", "recall") for figure in _SHOWN]
    metrics = [
        Metric(f"{figure}/{rule}", comparison.mean_and_sd(rule, figure)[0], now, 0)
        for figure in figures
        for rule in [*comparison.rules("learned"), *comparison.rules("reference")]
    ]
    client.log_batch(run_id, metrics=metrics)


class _Recommenders:
    """One recommender at a time, shared by all runs that differ in their rule only."""

    def __init__(self, data: PreparedData) -> None:
        self._data = data
        self._current: tuple[str, Recommender] | None = None

    def of(self, config: DictConfig) -> Recommender:
        """The recommender of a configuration; the backbone is loaded again only if something but the rule changed."""
        plain = as_dict(config)
        key = repr([plain[name] for name in ("backbone", "adapter", "split", "objective", "ranker", "trainer", "seed")])
        if self._current is None or self._current[0] != key:
            self._current = None  # the old backbone goes before the new one comes
            self._current = (key, build_recommender(config, self._data))
        return self._current[1]


def _one(config: DictConfig, recommenders: _Recommenders, run_dir: Path, parent_id: str) -> RuleResult:
    name = f"{rule_name(config)}-s{config.seed}"
    own = OmegaConf.merge(config, {"run_dir": str(run_dir / name)})
    assert isinstance(own, DictConfig)
    return Run(own, recommenders.of(config), parent_id).execute()


def _check_comparable(configs: Sequence[DictConfig]) -> None:
    """Refuse comparisons over anything but rules and seeds.

    Raises:
        ConfigError: Naming the settings that differ.
    """
    flat = [flatten(as_dict(config)) for config in configs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    differing = [key for key in keys if len({repr(settings.get(key)) for settings in flat}) > 1]
    other = [key for key in differing if key != "seed" and not key.startswith("aggregation.")]
    if other:
        raise ConfigError(
            f"compare varies aggregation and seed only, not {', '.join(other)}; use fellrec train -m for other sweeps"
        )
    names = [(rule_name(config), config.seed) for config in configs]
    twice = sorted({name for name, seed in names if names.count((name, seed)) > 1})
    if twice:
        raise ConfigError(
            f"{', '.join(twice)} would run twice with the same seed; compare one setting of a rule at a time "
            "or use fellrec train -m"
        )
