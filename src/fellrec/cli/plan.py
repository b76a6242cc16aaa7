"""``fellrec plan``: storage, memory, traffic and time of each combination of values, before anything is launched."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from fellrec.config.compose import compose
from fellrec.config.sweep import expand
from fellrec.errors import ConfigError
from fellrec.functional.cost import PartCost, human_bytes
from fellrec.planning.plan import Plan, Planner

_WIDTH = 120
"""Columns where standard output is no terminal."""

_SHOWN_BY_CUT = ("split.head_layers", "split.tail_layers")


@dataclass(frozen=True)
class Row:
    """One combination of values and what it costs.

    Attributes:
        values: The overrides that vary over the combinations, key → value.
        plan: The cost.
    """

    values: dict[str, str]
    plan: Plan


@dataclass(frozen=True)
class _Column:
    heading: str
    cell: Callable[[Plan], str]


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    rows = plan(options.overrides, options.probe)
    if options.format == "json":
        found = [{"values": row.values, **row.plan.to_dict()} for row in rows]
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    console = Console()
    print_plans(rows, console if console.is_terminal else Console(width=_WIDTH))


def plan(overrides: Sequence[str], probe_steps: int | None = None) -> list[Row]:
    """Plan every combination of comma-separated values.

    Args:
        overrides: Hydra overrides.
        probe_steps: Local steps to time for each combination; ``None`` for none.

    Raises:
        ConfigError: For a setting that is unknown or not allowed.
        DataError: If the data cannot be used.
        BackboneError: If the backbone cannot be read, cut, or adapted.
    """
    if probe_steps is not None and probe_steps < 1:
        raise ConfigError(f"--probe {probe_steps} is not allowed: a whole number of at least 1")
    combinations = expand(overrides)
    configs = [compose(combination, optional=("backbone.path",)) for combination in combinations]
    planner = Planner()
    return [
        Row(values, planner.plan(config, probe_steps))
        for values, config in zip(_varying(combinations), configs, strict=True)
    ]


def _varying(combinations: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    split = [dict(override.partition("=")[::2] for override in combination) for combination in combinations]
    every = dict.fromkeys(key for values in split for key in values)
    keys = [key for key in every if len({values.get(key) for values in split}) > 1]
    return [{key: values.get(key, "") for key in keys} for values in split]


def print_plans(rows: Sequence[Row], console: Console) -> None:
    """Print one line per combination; a table that is too wide for the console is cut between two columns."""
    console.print(_heading(rows), highlight=False)
    console.print()
    has_probe = rows[0].plan.seconds_per_round is not None
    for title, columns in (("storage and memory", _STORAGE), ("traffic of a round", _traffic_columns(has_probe))):
        for table in _fitting(rows, title, columns, console):
            console.print(table)
            console.print()
    console.print(_notes(rows), highlight=False)


def _heading(rows: Sequence[Row]) -> str:
    plans = [row.plan for row in rows]
    models = {f"{plan.backbone} with {plan.num_parameters:,} parameters" for plan in plans}
    data = {f"{plan.data} with {plan.num_clients} clients, {plan.cohort_size} a round" for plan in plans}
    loads = {
        f"{plan.load.mean.num_steps:,.0f} steps and {plan.load.mean.num_tokens:,.0f} padded tokens a client and round"
        for plan in plans
    }
    facts = [found.pop() if len(found) == 1 else None for found in (models, data, loads)]
    return "; ".join(fact for fact in facts if fact)


def _cut(plan: Plan) -> str:
    return f"{plan.head.num_layers}+{plan.body.num_layers}+{plan.tail.num_layers}"


def _both(of_part: Callable[[PartCost], float]) -> Callable[[Plan], str]:
    return lambda plan: _two(of_part(plan.client), of_part(plan.server))


def _two(first: float, second: float) -> str:
    return f"{human_bytes(first)}\n{human_bytes(second)}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"


def _shares(client: float) -> str:
    return f"{_percent(client)}\n{_percent(1 - client)}"


_STORAGE = (
    _Column("", lambda plan: "client\nserver"),
    _Column("weights", _both(lambda part: part.weight_bytes)),
    _Column("share", lambda plan: _shares(plan.client_weight_share)),
    _Column("saved", lambda plan: _percent(1 - plan.client_weight_share)),
    _Column("adapter", _both(lambda part: part.adapter_bytes)),
    _Column("optimiser", _both(lambda part: part.optimizer_bytes)),
    _Column("gradients", _both(lambda part: part.gradient_bytes)),
    _Column("activations", _both(lambda part: part.activation_bytes)),
    _Column("peak memory", lambda plan: _two(plan.client_peak_bytes, plan.server_peak_bytes)),
    _Column("compute", lambda plan: _shares(plan.client_compute_share)),
)


def _traffic_columns(has_probe: bool) -> tuple[_Column, ...]:
    columns = (
        _Column("", lambda plan: "up\ndown"),
        _Column("hidden", lambda plan: _two(plan.traffic.hidden_up_bytes, plan.traffic.hidden_down_bytes)),
        _Column("gradients", lambda plan: _two(plan.traffic.gradient_up_bytes, plan.traffic.gradient_down_bytes)),
        _Column("adapters", lambda plan: _two(plan.traffic.adapter_up_bytes, plan.traffic.adapter_down_bytes)),
        _Column("scalars", lambda plan: _two(plan.traffic.scalar_up_bytes, plan.traffic.scalar_down_bytes)),
        _Column("per client", lambda plan: _two(plan.traffic.up_bytes, plan.traffic.down_bytes)),
        _Column("all clients", _of_all_clients),
        _Column("cuts/adapters", _ratio),
        _Column("checkpoint", lambda plan: human_bytes(plan.checkpoint_bytes)),
    )
    return (*columns, _Column("s/round", lambda plan: f"{plan.seconds_per_round:.3g}")) if has_probe else columns


def _of_all_clients(plan: Plan) -> str:
    return _two(plan.traffic.up_bytes * plan.cohort_size, plan.traffic.down_bytes * plan.cohort_size)


def _ratio(plan: Plan) -> str:
    ratio = plan.cut_to_adapter_ratio
    return "" if ratio is None else f"{ratio:,.3g}" if ratio < 100 else f"{ratio:,.0f}"


def _fitting(rows: Sequence[Row], title: str, columns: Sequence[_Column], console: Console) -> list[Table]:
    """One table, or several with some of the columns each, so that no figure is cut."""
    table = _table(rows, title, columns)
    width = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    if width <= console.width or len(columns) <= 2:
        return [table]
    label, *others = columns
    half = (len(others) + 1) // 2
    rest = title if title.endswith("continued") else f"{title}, continued"
    return [
        *_fitting(rows, title, [label, *others[:half]], console),
        *_fitting(rows, rest, [label, *others[half:]], console),
    ]


def _table(rows: Sequence[Row], title: str, columns: Sequence[_Column]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    swept = [key for key in rows[0].values if key not in _SHOWN_BY_CUT]
    for heading in (*(key.rpartition(".")[2] for key in swept), "cut"):
        table.add_column(heading, no_wrap=True)
    for column in columns:
        table.add_column(column.heading, justify="right" if column.heading else "left", no_wrap=True)
    for row in rows:
        cells = [column.cell(row.plan) for column in columns]
        table.add_row(*(row.values[key] for key in swept), _cut(row.plan), *cells)
    return table


def _notes(rows: Sequence[Row]) -> str:
    plans = [row.plan for row in rows]
    shapes = sorted({plan.micro_batch for plan in plans})
    shown = ", ".join(f"{num_rows} x {tokens}" for num_rows, tokens in shapes)
    notes = [
        "cut: layers of head + body + tail. Head and tail are on the client, with embedding, norm and LM head.",
        "hidden, gradients: hidden states and their gradients, which cross the two cuts. cuts/adapters: their traffic "
        "over that of adapters.",
        "Exact: weights, adapter, optimiser (AdamW), gradients, checkpoint, steps; bytes of every crossing. "
        "Traffic is the mean over clients; evaluation comes on top.",
        f"Estimated: activations (what the largest micro-batch seen, {shown} tokens, keeps for its backward pass with "
        "fused attention), peak memory (their sum with weights, adapter, optimiser and gradients), compute (share of "
        "the forward pass).",
    ]
    if any(plan.settings.transport == "none" for plan in plans):
        notes.append("All parts run in one process here: the figures are those of a client and a server of their own.")
    for precision in sorted({plan.settings.precision for plan in plans} - {"32-true"}):
        notes.append(
            f"Activations are those of backbone.dtype; the casts of trainer.precision={precision} are left out."
        )
    if any(plan.settings.keeps_item_vectors for plan in plans):
        notes.append(
            "Item vectors that are kept are made without gradients beside the steps; tokens, memory and compute for it "
            "are left out. With objective.freeze_items_after above 0 the figures are of the rounds before it."
        )
    if any(plan.load.is_sampled for plan in plans):
        notes.append("Tokens were counted on a sample of the batches and scaled to all.")
    if not all(plan.has_own_tokenizer for plan in plans):
        notes.append("Tokens are estimates: the model's tokenizer is not here, one trained on the catalogue stands in.")
    if any(plan.seconds_per_round is not None for plan in plans):
        notes.append("s/round: median step of the largest client times all steps, on this machine; no evaluation.")
    return "\n".join(notes)
