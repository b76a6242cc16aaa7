"""``fellrec evaluate``: score a finished run's selected adapters again."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fellrec.config.compose import read_config
from fellrec.data.prepared import PreparedData
from fellrec.errors import ConfigError
from fellrec.experiment import build_data, build_loop, build_recommender
from fellrec.experiment.run import collect, reference_results, rule_name, table_cutoff
from fellrec.experiment.run_dir import check_prompt
from fellrec.report.comparison import Comparison, RuleResult
from fellrec.report.tables import print_comparison, results_console


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    comparison = evaluate(Path(options.run_dir), options.stage)
    if options.format == "json":
        sys.stdout.write(json.dumps(comparison.to_dict(), indent=1) + "\n")
    else:
        cutoff = table_cutoff(read_config(Path(options.run_dir)))
        print_comparison(comparison, results_console(), cutoff)


def evaluate(run_dir: Path, stage: str) -> Comparison:
    """Load the run's best adapters from its last checkpoint and rank all items again.

    Args:
        run_dir: Directory of a run.
        stage: ``"val"`` or ``"test"``.

    Raises:
        ConfigError: If the directory is no run's, or data or prompt are no longer what the run was trained on.
    """
    config = read_config(run_dir)
    data = build_data(config)
    _check_same_data(run_dir, data)
    recommender = build_recommender(config, data)
    check_prompt(run_dir, recommender.module.objective)
    loop = build_loop(config, recommender, ())
    loop.execution.load(loop, run_dir)
    bank, rows = loop.selected
    evaluation = loop.evaluate(stage, loop.state.selection.round_index, bank, rows)
    best_round = loop.state.selection.round_index
    result = RuleResult(rule_name(config), config.seed, "learned", evaluation, best_round=best_round)
    return collect(recommender, [result, *reference_results(config, recommender, loop, stage)])


def _check_same_data(run_dir: Path, data: PreparedData) -> None:
    trained_on = json.loads((run_dir / "data.json").read_text())["key"]
    if trained_on != data.key:
        raise ConfigError(
            f"the data has changed since {run_dir} was trained: its key was {trained_on}, now it is {data.key}"
        )
