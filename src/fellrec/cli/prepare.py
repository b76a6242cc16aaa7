"""``fellrec prepare``: read a data set, check its counts, print statistics, cache it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fellrec.cli.arguments import add_format, add_overrides

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fellrec.data.prepared import PreparedData

PURPOSE = "read a data set, verify its counts, print statistics, cache it"
EXAMPLES = (
    "fellrec prepare data=ml_1m data.root=ml-1m",
    "fellrec prepare data=ml_100k data.root=ml-100k data.core=5",
)

_LABELS = {
    "interactions_in_files": "interactions in the files",
    "repeats_dropped": "repeated interactions dropped",
    "neighbours": "successive interactions of a user",
    "tied_neighbours": "of them with equal times",
    "tied_holdouts": "of these in different stages",
}
"""What the table calls counts whose names do not say it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_overrides(parser)
    add_format(parser)


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    from fellrec.config.compose import compose
    from fellrec.config.data_files import check_data_files

    config = compose(options.overrides)
    check_data_files([config])
    from fellrec.config.paths import cache_dir
    from fellrec.experiment.build import build_data

    data = build_data(config)
    checks = _checks(config, data)
    if options.format == "json":
        found = {"name": data.name, "key": data.key, "statistics": dict(data.statistics), "checks": checks}
        sys.stdout.write(json.dumps({**found, "notes": data.notes}, indent=1) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    from fellrec.report.tables import PLAIN

    console = Console(**PLAIN)
    columns = {"value" if not data.members else "all": data.statistics}
    columns |= {name: own.statistics for name, own in data.members.items()}
    table = Table("statistic", *columns, title=f"{data.name}, key {data.key}", title_justify="left")
    for name in dict.fromkeys(name for counts in columns.values() for name in counts if name != "members"):
        cells = [_shown(counts[name]) if name in counts else "" for counts in columns.values()]
        table.add_row(_LABELS.get(name, name.replace("_", " ")), *cells)
    console.print(table)
    for line in (*checks, *(f"note: {note}" for note in data.notes)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    keys = [own.key for own in data.members.values()] or [data.key]
    folders = ", ".join(str(cache_dir(config) / "data" / key) for key in keys)
    console.print(f"cached in {folders}", highlight=False, markup=False, soft_wrap=True)


def _checks(config: DictConfig, data: PreparedData) -> list[str]:
    """The checks of a data set, or of each member of a federation."""
    from fellrec.config.members import member_configs

    if not data.members:
        return verify(config, data.statistics)
    return [
        f"{name}: {line}"
        for name, own in member_configs(config).items()
        for line in verify(own, data.members[name].statistics)
    ]


def verify(config: DictConfig, statistics: Mapping[str, Any]) -> list[str]:
    """Compare the counts of a data set with the published ones in ``data.expected``.

    Args:
        config: The composed configuration.
        statistics: Counts of the prepared data.

    Returns:
        One line per published count: ``ok`` or ``differs``.
    """
    core = config.data.core
    suffixes = {"as_read": "_as_read", f"core_{core}": "_after_core"}
    if str(config.holdout["_target_"]).endswith("GlobalTime"):
        suffixes[f"core_{core}_global_time"] = "_of_all_users"
    lines = []
    for case, counts in config.data.expected.items():
        if case not in suffixes or (case == f"core_{core}_global_time" and config.data.max_users is not None):
            continue
        for name, expected in counts.items():
            found = statistics[f"{name}{suffixes[case]}"]
            verdict = "ok" if found == expected else "differs"
            lines.append(f"{verdict}: {name} ({case.replace('_', ' ')}) {found:,}, published {expected:,}")
    return lines


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        text = ", ".join(f"{item:,}" for item in value[:20])
        return text + (f", … ({len(value)} clients)" if len(value) > 20 else "")
    return f"{value:,}"
