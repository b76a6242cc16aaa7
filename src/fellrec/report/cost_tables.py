"""What runs cost, as tables: one line per variant of a comparison, or one run's traffic by kind and direction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from fellrec.functional.cost import human_bytes
from fellrec.report.comparison import Comparison
from fellrec.report.costs import DIRECTIONS, RunCost
from fellrec.report.tables import display_name, markdown

_KINDS = {"hidden_state": "hidden states", "gradient": "gradients", "adapter": "adapters", "scalar": "scalars"}

COSTS: dict[str, Callable[[RunCost], float | None]] = {
    "cost/client/weight_bytes": lambda cost: cost.storage.client_bytes,
    "cost/server/weight_bytes": lambda cost: cost.storage.server_bytes,
    "cost/round_bytes": lambda cost: cost.round_bytes(),
    "cost/server/busy_rate": lambda cost: cost.rounds.busy_rate("server"),
}
"""Figures of a comparison's parent run, by their names in MLflow."""


def cost_panels(comparison: Comparison, cutoff: int) -> tuple[str, list[str], dict[str, dict[str, list[float | None]]]]:
    """What ``plots.panels`` draws: quality and cost of every variant, a line per rule."""
    variants = comparison.variants
    of_rule = {result.rule: None for result in comparison.results if result.kind == "learned"}
    ndcg = f"ndcg_at_{cutoff}"
    figures: dict[str, Callable[[str], float | None]] = {
        f"NDCG@{cutoff}, mean over clients": lambda rule: comparison.mean_and_sd(rule, f"{ndcg}/mean")[0],
        f"NDCG@{cutoff}, std over clients": lambda rule: comparison.mean_and_sd(rule, f"{ndcg}/std")[0],
        "client weights, MB": lambda rule: _scaled(comparison.cost(rule, COSTS["cost/client/weight_bytes"]), 1e-6),
        "traffic of a round, MB": lambda rule: _scaled(comparison.cost(rule, COSTS["cost/round_bytes"]), 1e-6),
        "seconds of a round": comparison.seconds_per_round,
        "server busy, %": lambda rule: _scaled(comparison.cost(rule, COSTS["cost/server/busy_rate"]), 100),
    }
    shown = {
        title: {display_name(rule): [figure(f"{rule} {variant}") for variant in variants] for rule in of_rule}
        for title, figure in figures.items()
    }
    keys = {variant.partition("=")[0] for variant in variants} if all(" " not in v for v in variants) else set()
    if len(keys) == 1:
        return f"split.{keys.pop()}", [variant.partition("=")[2] for variant in variants], shown
    return "split", [variant.replace(" ", "\n") for variant in variants], shown


def cost_frame(comparison: Comparison, cutoff: int) -> pd.DataFrame:
    """Quality beside cost as text, one row per rule and variant; figures are means over seeds."""
    ndcg = f"ndcg_at_{cutoff}"
    rows = []
    for rule in comparison.rules("learned"):
        seconds = comparison.seconds_per_round(rule)
        rows.append(
            {
                "rule": display_name(rule),
                f"NDCG@{cutoff}": f"{comparison.mean_and_sd(rule, f'{ndcg}/mean')[0]:.4f}",
                "std": f"{comparison.mean_and_sd(rule, f'{ndcg}/std')[0]:.4f}",
                "client": _bytes(comparison.cost(rule, lambda cost: cost.storage.client_bytes)),
                "server": _bytes(comparison.cost(rule, lambda cost: cost.storage.server_bytes)),
                "up": _bytes(comparison.cost(rule, lambda cost: cost.round_bytes("up"))),
                "down": _bytes(comparison.cost(rule, lambda cost: cost.round_bytes("down"))),
                "s/round": "" if seconds is None else f"{seconds:.1f}",
                "server busy": _percent(comparison.cost(rule, lambda cost: cost.rounds.busy_rate("server"))),
            }
        )
    return pd.DataFrame(rows)


def print_cost(comparison: Comparison, console: Console, cutoff: int) -> None:
    """Print ``cost_frame``."""
    frame = cost_frame(comparison, cutoff)
    table = Table(
        title="cost",
        caption="client, server: weights in memory, LoRA included. up, down: bytes of a round of training, all clients "
        "together. server busy: share of the rounds' time.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in frame.columns:
        table.add_column(name, justify="left" if name == "rule" else "right", no_wrap=True)
    for row in frame.itertuples(index=False):
        table.add_row(*row)
    console.print(table)


def write_cost(comparison: Comparison, folder: Path, cutoff: int) -> None:
    """Write ``cost.csv`` and ``cost.md`` into ``folder``."""
    frame = cost_frame(comparison, cutoff)
    frame.to_csv(folder / "cost.csv", index=False)
    (folder / "cost.md").write_text(markdown(frame))


def print_run_cost(cost: RunCost, console: Console) -> None:
    """Print one run's traffic by kind and direction, and below it storage, time, memory and what was saved."""
    table = Table(title="bytes of a round", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("")
    for direction in DIRECTIONS:
        table.add_column(direction, justify="right")
    for kind in cost.train_bytes:
        table.add_row(_KINDS[kind], *(human_bytes(cost.round_bytes(direction, kind)) for direction in DIRECTIONS))
    table.add_row("together", *(human_bytes(cost.round_bytes(direction)) for direction in DIRECTIONS))
    console.print(table)
    console.print("\n".join(_facts(cost)), highlight=False)


def _facts(cost: RunCost) -> list[str]:
    storage, rounds = cost.storage, cost.rounds
    facts = [
        f"weights: client {human_bytes(storage.client_bytes)} ({_percent(storage.client_share)}), "
        f"server {human_bytes(storage.server_bytes)}; evaluation crossed {human_bytes(cost.evaluation_bytes)}"
    ]
    server, client = rounds.busy_rate("server"), rounds.busy_rate("client")
    if server is not None and client is not None:
        facts.append(
            f"busy in {rounds.seconds:.1f} s of {rounds.num_rounds} rounds: server {_percent(server)}, "
            f"client {_percent(client)}"
        )
    peaks = [rounds.peaks.get(f"{role}/peak_bytes") for role in ("client", "server")]
    if peaks[0] is not None and peaks[1] is not None:
        in_one = "client and server in one process " + human_bytes(max(peaks[0], peaks[1]))
        in_two = f"client {human_bytes(peaks[0])}, server {human_bytes(peaks[1])}"
        facts.append(f"peak memory: {in_one if cost.transport == 'inprocess' else in_two}")
    return facts


def _bytes(value: float | None) -> str:
    return "" if value is None else human_bytes(value)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.0f} %"
