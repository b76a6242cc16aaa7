"""``fellrec compare``: several rules and seeds on one partition, one table."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from fellrec.build import Recommender, build_data, build_recommender
from fellrec.config import as_dict, compose, expand
from fellrec.errors import ConfigError
from fellrec.records import check_new, new_run_dir, write_json
from fellrec.runs import Run, finish_message, reference_results, rule_name
from fellrec.tracking.results import Comparison, RuleResult
from fellrec.tracking.store import parent_run
from fellrec.tracking.tables import print_comparison, write_tables

_DEFAULT_RULES = "aggregation=local,fedavg,fellrec,centralized"


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    overrides = list(options.overrides)
    if not any(item.startswith("aggregation=") for item in overrides):
        overrides.append(_DEFAULT_RULES)
    configs = [compose(combination) for combination in expand(overrides)]
    if options.show_config:
        sys.stdout.write("---\n".join(OmegaConf.to_yaml(config) for config in configs))
        return
    comparison, run_dir = compare(configs)
    if options.format == "json":
        sys.stdout.write(json.dumps(comparison.to_dict(), indent=1) + "\n")
        return
    console = Console()
    print_comparison(comparison, console)
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
    first = configs[0]
    data = build_data(first)
    run_dir = new_run_dir(first.run_dir, f"{first.data.name}-compare")
    recommenders = _Shared()
    results: list[RuleResult] = []
    with parent_run(first.tracking.uri, first.tracking.experiment, run_dir.name) as parent_id:
        for config in configs:
            recommender = recommenders.get(config, data)
            config.run_dir = str(run_dir / f"{rule_name(config)}-s{config.seed}")
            results.append(Run(config, recommender, parent_id).execute())
        ...
    return comparison, run_dir
