"""Tables of costs: one line per rule and variant of a comparison, or one run's traffic by kind and direction."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pandas as pd
from rich.console import Console

from fellrec.functional.cost import human_bytes
from fellrec.report.comparison import Comparison
from fellrec.report.costs import DIRECTIONS, RunCost
from fellrec.report.tables import display_name, number_text, text_table, write_table

KINDS = {
    "hidden_state": "hidden states",
    "gradient": "gradients",
    "adapter": "adapters",
    "scalar": "scalars",
    "masked": "masked updates",
    "key": "keys and shares",
}
"""Kinds of the ledger → what they are called."""

COSTS: dict[str, Callable[[RunCost], float | None]] = {
    "cost/client/weight_bytes": lambda cost: cost.storage.client_bytes,
    "cost/server/weight_bytes": lambda cost: cost.storage.server_bytes,
    "cost/round_bytes": lambda cost: cost.round_bytes(),
    "cost/server/busy_rate": lambda cost: cost.rounds.busy_rate("server"),
}
"""Costs that a comparison's parent run logs, by their names in MLflow."""


def cost_panels(comparison: Comparison, cutoff: int) -> tuple[str, list[str], dict[str, dict[str, list[float | None]]]]:
    """The arguments of ``plots.panels``: quality and cost of every variant, a line per rule."""
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
        title: {rule: [figure(f"{rule} {variant}") for variant in variants] for rule in of_rule}
        for title, figure in figures.items()
    }
    keys = {variant.partition("=")[0] for variant in variants} if all(" " not in v for v in variants) else set()
    if len(keys) == 1:
        return f"split.{keys.pop()}", [variant.partition("=")[2] for variant in variants], shown
    return "split", [variant.replace(" ", "\n") for variant in variants], shown


def cost_frame(comparison: Comparison, cutoff: int) -> pd.DataFrame:
    """Quality and cost as text, one row per rule and variant; means over seeds."""
    ndcg = f"ndcg_at_{cutoff}"
    rows = [
        {
            "rule": display_name(rule),
            f"NDCG@{cutoff}": f"{comparison.mean_and_sd(rule, f'{ndcg}/mean')[0]:.4f}",
            "std": f"{comparison.mean_and_sd(rule, f'{ndcg}/std')[0]:.4f}",
            "client": _bytes(comparison.cost(rule, lambda cost: cost.storage.client_bytes)),
            "server": _bytes(comparison.cost(rule, lambda cost: cost.storage.server_bytes)),
            "up": _bytes(comparison.cost(rule, lambda cost: cost.round_bytes("up"))),
            "down": _bytes(comparison.cost(rule, lambda cost: cost.round_bytes("down"))),
            "s/round": number_text(comparison.seconds_per_round(rule), ".1f"),
            "server busy": _percent(comparison.cost(rule, lambda cost: cost.rounds.busy_rate("server"))),
        }
        for rule in comparison.rules("learned")
    ]
    return pd.DataFrame(rows)


def print_cost(comparison: Comparison, console: Console, cutoff: int) -> None:
    """Print ``cost_frame``."""
    frame = cost_frame(comparison, cutoff)
    caption = (
        "client, server: weights in memory, LoRA included. up, down: bytes of a round of training, all clients "
        "together. server busy: fraction of the rounds' time."
    )
    console.print(text_table("cost", frame.columns, frame.itertuples(index=False), caption))


def write_cost(comparison: Comparison, folder: Path, cutoff: int) -> None:
    """Write ``cost.csv`` and ``cost.md`` into ``folder``."""
    frame = cost_frame(comparison, cutoff)
    write_table(folder, "cost", frame, frame, comparison.measured_with)


def print_run_cost(cost: RunCost, console: Console) -> None:
    """Print one run's traffic by kind and direction, and below it storage, time and memory."""
    kinds = {**{KINDS[kind]: kind for kind in cost.train_bytes}, "total": None}
    rows = [
        [name, *(human_bytes(cost.round_bytes(direction, kind)) for direction in DIRECTIONS)]
        for name, kind in kinds.items()
    ]
    console.print(text_table("bytes of a round", ("", *DIRECTIONS), rows, padding=(0, 1)))
    console.print("\n".join(_summary(cost)), highlight=False)


def _summary(cost: RunCost) -> list[str]:
    storage, rounds = cost.storage, cost.rounds
    lines = [
        f"weights: client {human_bytes(storage.client_bytes)} ({_percent(storage.client_fraction)}), "
        f"server {human_bytes(storage.server_bytes)}; evaluation crossed {human_bytes(cost.evaluation_bytes)}"
    ]
    server, client = rounds.busy_rate("server"), rounds.busy_rate("client")
    if server is not None and client is not None:
        lines.append(
            f"busy in {rounds.seconds:.1f} s of {rounds.num_rounds} rounds: server {_percent(server)}, "
            f"client {_percent(client)}"
        )
    peaks = [rounds.peaks.get(f"{role}/peak_bytes") for role in ("client", "server")]
    if peaks[0] is not None and peaks[1] is not None:
        in_one = "client and server in one process " + human_bytes(max(peaks[0], peaks[1]))
        in_two = f"client {human_bytes(peaks[0])}, server {human_bytes(peaks[1])}"
        lines.append(f"peak memory: {in_one if cost.transport == 'inprocess' else in_two}")
    return lines


def _bytes(value: float | None) -> str:
    return "" if value is None else human_bytes(value)


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.0f} %"
