"""The table, the figure and the JSON file of results."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.environments import ROOT
from bench.rows import Result

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"
"""Of Okabe and Ito."""


def facts() -> dict[str, Any]:
    """Where the results come from."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    done = subprocess.run(git, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    return {
        "commit": done.stdout.strip() or "unknown",
        "threads": int(os.environ.get("OMP_NUM_THREADS", "1")),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def print_table(results: Sequence[Result], known: dict[str, Any]) -> None:
    """Print medians, spread and targets."""
    table = Table(title="fellrec against others: medians and smallest to largest value of the repeats")
    for name in ("row", "value", "spread", "CPU", "target", "", "losses differ by", "note"):
        table.add_column(name, justify="left" if name in ("row", "note") else "right", overflow="fold")
    for result in results:
        found = result.to_dict()
        value = "void" if result.is_void else "not measured" if found["value"] is None else f"{found['value']:.2f}"
        spread = "" if found["spread"] is None else "–".join(f"{end:.2f}" for end in found["spread"])
        cpu = "" if found["cpu_value"] is None else f"{found['cpu_value']:.2f}"
        reached = {None: "", True: "reached", False: "missed"}[result.is_reached]
        differ = "" if result.difference is None else f"{result.difference:.0e}"
        sign = "≥" if result.is_share else "≤"
        table.add_row(result.what, value, spread, cpu, f"{sign} {result.target:g}", reached, differ, result.note)
    console = Console(width=140)
    console.print(table)
    console.print("Commit {commit}, {threads} thread(s), {cores} cores, load {load:.1f}.".format(**known))


def write(results: Sequence[Result], known: dict[str, Any], file: Path) -> None:
    """Write results and facts as JSON."""
    file.write_text(json.dumps({**known, "results": [result.to_dict() for result in results]}, indent=1) + "\n")


def draw(results: Sequence[Result], file: Path) -> None:
    """Draw each value as a multiple of its target: medians as points, from the smallest to the largest as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [result for result in results if result.value is not None]
    if not shown:
        return
    figure, axes = plt.subplots(figsize=(9, 0.3 * len(shown) + 1.2), layout="constrained")
    for place, result in enumerate(reversed(shown)):
        of_target = [result.target / v if result.is_share else v / result.target for v in result.values]
        middle = statistics.median(of_target)
        colour = BLUE if result.is_reached else ORANGE
        axes.plot([min(of_target), max(of_target)], [place, place], color=colour, linewidth=1.5)
        axes.plot([middle], [place], "o" if result.is_reached else "s", color=colour)
    axes.set_yticks(range(len(shown)), [f"{result.what} ({result.target:g})" for result in reversed(shown)])
    axes.axvline(1.0, color=GREY, linestyle="--", linewidth=1)
    axes.set_xscale("log")
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("measured / target (reached up to 1)")
    figure.savefig(file, dpi=150)
    plt.close(figure)
