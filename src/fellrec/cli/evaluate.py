"""``fellrec evaluate``: evaluate the selected adapters of a finished run again."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fellrec.cli.arguments import add_format, add_run_dir, add_trust

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fellrec.report.comparison import Comparison

PURPOSE = "evaluate a finished run's adapters again on the validation or test split"
EXAMPLES = (
    "fellrec evaluate runs/RUN",
    "fellrec evaluate runs/RUN --stage val --format json",
    "fellrec evaluate runs/RUN data.root=/elsewhere/ml-1m",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_run_dir(parser)
    parser.add_argument("--stage", choices=("val", "test"), default="test", help="split to rank (default: test)")
    add_format(parser)
    places = "data.root=…, data.path=…, backbone.path=… or cache_dir=…: where the files of the run are now"
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help=places)
    add_trust(parser)


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    from fellrec.config.stored import moved, read_config

    run_dir = Path(options.run_dir)
    config = moved(read_config(run_dir, options.trust), options.overrides)
    comparison = evaluate(run_dir, options.stage, config)
    if options.format == "json":
        sys.stdout.write(json.dumps(comparison.to_dict(), indent=1) + "\n")
        return
    from fellrec.experiment.names import table_cutoff
    from fellrec.report.main_table import print_comparison
    from fellrec.report.tables import results_console

    print_comparison(comparison, results_console(), table_cutoff(config))


def evaluate(run_dir: Path, stage: str, config: DictConfig | None = None) -> Comparison:
    """Load the run's best adapters from its last checkpoint and rank all items again.

    Args:
        run_dir: Directory of a run.
        stage: ``"val"`` or ``"test"``.
        config: The run's configuration, with other places of its files; ``None`` for the one in the directory.

    Raises:
        ConfigError: If it is not the directory of a finished run, or data, backbone or prompt differ from those of
            training.
    """
    from fellrec.config.stored import read_config
    from fellrec.experiment.names import rule_name
    from fellrec.experiment.restore import restore
    from fellrec.experiment.results import collect, reference_results
    from fellrec.report.comparison import RuleResult

    config = read_config(run_dir) if config is None else config.copy()
    recommender, federation = restore(run_dir, config)
    loop, best_round = federation.loop(), federation.selection.round_index
    evaluation = loop.evaluate(federation.selection.score_jobs(), stage, best_round)
    result = RuleResult(rule_name(config), config.seed, "learned", evaluation, best_round=best_round)
    return collect(recommender, [result, *reference_results(config, recommender, loop, stage)], run_dir)
