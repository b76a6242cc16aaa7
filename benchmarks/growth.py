"""How cost grows: CPU seconds of a round and of an evaluation by clients, catalogue, history and rank, one at a time.

    python benchmarks/growth.py [--axes clients,catalogue,history,rank] [--json FILE] [--figure docs/growth.svg]

Synthetic data, the tiny backbone with LoRA, one thread. A round is the training of all clients, with a fixed number of
optimiser steps each, and the aggregation (FELLRec). The exponent is the slope of the last half of a line in log-log
axes: 1 is proportional, 0 is constant.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from fellrec.config.compose import compose
from fellrec.experiment.build import build_data, build_recommender
from fellrec.experiment.federation import build_federation

COMMON = (
    *("data=synthetic", "data.reader.preset=micro_lens_shaped", "data.public_user_rate=0.1", "adapter=lora"),
    *("backbone.pretrain.steps=1", "backbone.num_layers=2", "trainer.max_local_steps=2", "trainer.batch_size=16"),
    *(
        "backbone.max_position_embeddings=1024",
        "trainer.cutoffs=[10]",
        "aggregation=fellrec",
        "trainer.num_rounds=1000",
        "trainer.evaluate_every=1000",
    ),
)
USERS = ("data.reader.num_users=400", "data.reader.num_items=2000")
Overrides = Callable[[int], Sequence[str]]
AXES: dict[str, tuple[str, tuple[int, ...], Overrides]] = {
    "clients": (
        "clients, one user each",
        (5, 50, 500, 5000),
        lambda n: (
            *(f"data.reader.num_users={round(n / 0.9)}", "data.reader.num_items=500", "partition=per_user"),
            *("trainer.max_local_steps=1",),
        ),
    ),
    "catalogue": (
        "items of the catalogue",
        (1000, 5000, 20000, 80000),  # nearly all of which occur in the data; those that do are counted
        lambda n: (
            *("data.reader.num_users=400", "data.reader.mean_length=400", f"data.reader.num_items={n}"),
            *("data.reader.habit_rate=0", "data.reader.random_rate=1"),
        ),
    ),
    "history": (
        "longest history, items",
        (5, 10, 20, 40),
        lambda n: (*USERS, "data.reader.mean_length=200", f"data.max_history={n}"),
    ),
    "rank": ("rank of LoRA", (4, 8, 16, 32, 64), lambda n: (*USERS, f"adapter.rank={n}")),
}


def measure(overrides: Sequence[str]) -> dict[str, float]:
    """CPU seconds of a round after the first, and of an evaluation; and the number of items."""
    config = compose([*COMMON, *overrides])
    data = build_data(config)
    loop = build_federation(config, build_recommender(config, data)).loop([])
    found = {"items": float(len(data.catalogue))}
    loop.run_round(0)
    for name, work in {"round": lambda: loop.run_round(1), "evaluation": lambda: loop.validate(1)}.items():
        started = time.process_time()
        work()
        found[name] = time.process_time() - started
    return found


def exponent(values: Sequence[int], seconds: Sequence[float]) -> float:
    """Slope of the last half of a line in log-log axes."""
    last = slice((len(values) - 1) // 2, None)
    return float(np.polyfit(np.log(values[last]), np.log(seconds[last]), 1)[0])


def show(results: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title="CPU seconds, one thread")
    for column in ("by", "value", "round", "evaluation"):
        table.add_column(column, justify="left" if column == "by" else "right")
    for name, rows in results.items():
        for row in rows["rows"]:
            table.add_row(name, f"{row['value']:,}", f"{row['round']:.2f}", f"{row['evaluation']:.2f}")
        table.add_row(name, "exponent", f"{rows['round']:.2f}", f"{rows['evaluation']:.2f}", end_section=True)
    Console(width=100).print(table)


def draw(results: dict[str, Any], path: Path) -> None:
    """One panel for each axis, in log-log axes."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"
    from matplotlib import pyplot as plt

    size = 3 * len(results), 3
    figure, panels = plt.subplots(1, len(results), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for panel, (name, rows) in zip(panels[0], results.items(), strict=True):
        values = [row["value"] for row in rows["rows"]]
        for line, colour, marker in (("round", "#0072B2", "o"), ("evaluation", "#D55E00", "s")):
            seconds = [row[line] for row in rows["rows"]]
            panel.loglog(values, seconds, color=colour, marker=marker, label=f"{line}, exponent {rows[line]:.2f}")
        panel.set_xlabel(AXES[name][0])
        panel.set_xticks(values, [f"{value:,}" for value in values])
        panel.set_xticks([], minor=True)
        panel.grid(True, which="major", alpha=0.3)
        panel.legend(fontsize=7)
    panels[0][0].set_ylabel("CPU seconds")
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join(AXES), help="what to vary, separated by commas")
    parser.add_argument("--largest", type=int, help="leave out larger values of every axis")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--figure", type=Path, help="draw the results into this file")
    options = parser.parse_args(arguments)
    unknown = set(options.axes.split(",")) - set(AXES)
    if unknown:
        sys.exit(f"--axes={options.axes}: {', '.join(sorted(unknown))} must be among {', '.join(AXES)}")
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in options.axes.split(","):
        _, values, overrides = AXES[name]
        values = tuple(value for value in values if options.largest is None or value <= options.largest)
        rows = [{"value": value, **measure(overrides(value))} for value in values]
        if name == "catalogue":
            rows = [{**row, "value": int(row["items"])} for row in rows]
        places = [int(row["value"]) for row in rows]
        slopes = {line: exponent(places, [row[line] for row in rows]) for line in ("round", "evaluation")}
        results[name] = {"rows": rows, **slopes}
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.figure:
        draw(results, options.figure)
    show(results)


if __name__ == "__main__":
    main()
