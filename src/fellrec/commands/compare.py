"""``fellrec compare``: several rules and their settings, seeds and cuts on one partition, one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from fellrec.aggregation.build import build_aggregation, effective_settings
from fellrec.atomic import write_json
from fellrec.build import Recommender, build_data, build_loop, build_recommender, recommender_key
from fellrec.config import as_dict, compose, expand, without_launcher
from fellrec.data.prepared import PreparedData
from fellrec.errors import ConfigError
from fellrec.functional.nested import flatten
from fellrec.launch.local import other_ranks
from fellrec.ranked import Ranks, processes_to_start, run_ranks
from fellrec.records import check_new, new_run_dir
from fellrec.runs import Run, collect, finish_message, reference_results, rule_name, run_name, table_cutoff
from fellrec.tracking.cost_tables import COSTS, cost_panels, print_cost, write_cost
from fellrec.tracking.plots import client_dots, panels, save_png
from fellrec.tracking.results import Comparison, RuleResult
from fellrec.tracking.run_log import NewRun, RunLog, parent_run
from fellrec.tracking.significance import print_significance, with_significance, write_significance
from fellrec.tracking.store import check_reachable
from fellrec.tracking.tables import display_name, print_comparison, results_console, write_tables

_SHOWN = ("mean", "pooled", "variance", "worst")
_DEFAULT_RULES = "aggregation=local,fedavg,fellrec,centralized"


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    configs = configurations(options.overrides)
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
        configs: One per rule, seed and cut; data, partition and backbone are the same in all.
        ranks: All processes, if there are several.

    Returns:
        The results, and the directory that holds every run.

    Raises:
        ConfigError: If the configurations differ in more than rule, seed and split.
    """
    labels = _labels(configs)
    _check_comparable(configs, labels)
    for config in configs:
        build_aggregation(config.aggregation)  # a rule that cannot be built must not be found out an hour later
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
            _one(config, label, recommenders, run_dir, log.uid) for config, label in zip(configs, labels, strict=True)
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


def configurations(overrides: Sequence[str]) -> list[DictConfig]:
    """One configuration per combination; where nothing but seeds is compared, over the rules that are always shown.

    Where rules and a setting are varied together, a rule that does not have the setting is there once.
    """
    configs = [without_launcher(compose(combination)) for combination in expand(overrides)]
    if not any(item.startswith("aggregation=") for item in overrides) and not any(_cuts(configs)):
        configs = [without_launcher(compose(combination)) for combination in expand([*overrides, _DEFAULT_RULES])]
    return list({_identity(config): config for config in reversed(configs)}.values())[::-1]


def _identity(config: DictConfig) -> str:
    """The same for configurations that give the same run."""
    rest = {key: value for key, value in as_dict(config).items() if key != "aggregation"}
    return repr([config.aggregation.get("_target_"), effective_settings(config.aggregation), rest])


@dataclass(frozen=True)
class _Label:
    """What tells a run of a comparison from the others.

    Attributes:
        rule: With the settings that vary for it, such as ``fellrec alpha=0.3``.
        variant: What varies of the split, such as ``head_layers=2``; empty if nothing does.
        seed: Of the run.
    """

    rule: str
    variant: str
    seed: int


def _labels(configs: Sequence[DictConfig]) -> list[_Label]:
    return [
        _Label(" ".join([rule_name(config), settings]).strip(), variant, config.seed)
        for config, settings, variant in zip(configs, _settings(configs), _cuts(configs), strict=True)
    ]


def _settings(configs: Sequence[DictConfig]) -> list[str]:
    """The settings of each configuration's rule that vary among those of the same rule."""
    rules = [str(config.aggregation.get("_target_")) for config in configs]
    settings = [effective_settings(config.aggregation) for config in configs]
    of_rule = {rule: [own for name, own in zip(rules, settings, strict=True) if name == rule] for rule in rules}
    return [_varying(own, of_rule[rule]) for rule, own in zip(rules, settings, strict=True)]


def _cuts(configs: Sequence[DictConfig]) -> list[str]:
    """What the split of each configuration has of its own."""
    flat = [flatten(as_dict(config.split)) for config in configs]
    return [_varying(own, flat) for own in flat]


def _varying(own: Mapping[str, Any], everyone: Sequence[Mapping[str, Any]]) -> str:
    keys = [key for key in own if len({repr(settings.get(key)) for settings in everyone}) > 1]
    return " ".join(f"{key}={str(own[key]).lower()}" for key in keys)


def _one(config: DictConfig, label: _Label, recommenders: _Recommenders, run_dir: Path, parent_uid: str) -> RuleResult:
    own = OmegaConf.merge(config, {"run_dir": str(run_dir / run_name(label.rule, label.variant, label.seed))})
    assert isinstance(own, DictConfig)
    return Run(own, recommenders.of(config), parent_uid, label.rule, label.variant).execute()


def _check_comparable(configs: Sequence[DictConfig], labels: Sequence[_Label]) -> None:
    """Refuse comparisons over anything but rules, their settings, seeds and the split.

    Raises:
        ConfigError: Naming the settings that differ.
    """
    flat = [flatten(as_dict(config)) for config in configs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    differing = [key for key in keys if len({repr(settings.get(key)) for settings in flat}) > 1]
    other = [key for key in differing if key != "seed" and not key.startswith(("aggregation.", "split."))]
    if other:
        raise ConfigError(
            f"compare varies aggregation, seed and split only, not {', '.join(other)}; "
            "use fellrec train -m for other sweeps"
        )
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ConfigError(
            f"two runs would both be called {run_name(twice.rule, twice.variant, twice.seed)}: rules are told apart by "
            "the names of their classes"
        )
    if any(config.split.transport == "distributed" for config in configs):
        raise ConfigError(
            "compare runs in one process: split.transport=distributed is not allowed, only none or inprocess; "
            "start distributed runs by torchrun … -m fellrec train"
        )
