"""``fellrec prepare``: read a data set, check its counts, print statistics, cache it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from fellrec.config.compose import compose
from fellrec.config.instantiate import as_dict
from fellrec.experiment import build_data, cache_dir


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    config = compose(options.overrides)
    data = build_data(config)
    checks = verify(config, data.statistics)
    if options.format == "json":
        found = {"name": data.name, "key": data.key, "statistics": dict(data.statistics), "checks": checks}
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    console = Console()
    table = Table("statistic", "value", title=f"{data.name}, key {data.key}", title_justify="left")
    for name, value in data.statistics.items():
        table.add_row(name.replace("_", " "), _shown(value))
    console.print(table)
    for line in checks:
        console.print(line, highlight=False)
    console.print(f"cached in {cache_dir(config) / 'data' / data.key}", highlight=False, soft_wrap=True)


def verify(config: DictConfig, statistics: Mapping[str, Any]) -> list[str]:
    """Compare what was read with the published counts that ``data.expected`` knows.

    Returns:
        One line per known count: ``ok`` or ``differs``.
    """
    core = config.data.core
    suffixes = {"as_read": "_as_read", f"core_{core}": "_after_core"}
    if str(config.holdout["_target_"]).endswith("GlobalTime"):
        suffixes[f"core_{core}_global_time"] = ""
    lines = []
    for case, counts in as_dict(config.data)["expected"].items():
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
