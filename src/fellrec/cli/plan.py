"""``fellrec plan``: storage, memory, traffic and time of each combination of values, before a run starts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fellrec.cli.arguments import add_format, add_overrides
from fellrec.errors import ConfigError

if TYPE_CHECKING:
    from fellrec.planning.table import Row

PURPOSE = "storage, memory, traffic and time of a run, before it starts"
EXAMPLES = (
    "fellrec plan data=ml_1m data.root=ml-1m backbone=hf backbone.config=llama_2_7b split.head_layers=1,2,4,8,20",
    "fellrec plan backbone=hf backbone.path=MODEL_FOLDER split.head_layers=1,2 --format json",
    "fellrec plan split.head_layers=1,2 --probe 5",
)

_WIDTH = 120
"""Columns of the table if standard output is not a terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_overrides(parser)
    add_format(parser)
    parser.add_argument(
        "--probe", type=int, metavar="STEPS", help="time this many local steps of the largest client (needs weights)"
    )


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    rows = plan(options.overrides, options.probe)
    if options.format == "json":
        found = [{"values": row.values, **row.plan.to_dict()} for row in rows]
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    from rich.console import Console

    from fellrec.planning.table import print_plans
    from fellrec.report.tables import PLAIN

    console = Console(**PLAIN)
    print_plans(rows, console if console.is_terminal else Console(width=_WIDTH, **PLAIN))


def plan(overrides: Sequence[str], probe_steps: int | None = None) -> list[Row]:
    """Plan every combination of comma-separated values.

    Args:
        overrides: Hydra overrides.
        probe_steps: Local steps to time for each combination; ``None`` for none.

    Raises:
        ConfigError: If a setting is unknown or not allowed.
        DataError: If the data cannot be used.
        BackboneError: If the backbone cannot be read, split, or adapted.
    """
    from fellrec.config.compose import check_limits, compose
    from fellrec.config.sweep import expand

    if probe_steps is not None and probe_steps < 1:
        raise ConfigError(f"--probe {probe_steps} is not allowed: a whole number of at least 1")
    combinations = expand(overrides)
    configs = [compose(combination, optional=("backbone.path",)) for combination in combinations]
    check_limits(configs)
    from fellrec.planning.plan import Planner
    from fellrec.planning.table import Row

    planner = Planner()
    return [
        Row(values, plan)
        for values, config in zip(_varying(combinations), configs, strict=True)
        for plan in planner.plans(config, probe_steps)
    ]


def _varying(combinations: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    split = [dict(override.partition("=")[::2] for override in combination) for combination in combinations]
    every = dict.fromkeys(key for values in split for key in values)
    keys = [key for key in every if len({values.get(key) for values in split}) > 1]
    return [{key: values.get(key, "") for key in keys} for values in split]
