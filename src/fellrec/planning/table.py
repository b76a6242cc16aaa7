"""The tables that ``fellrec plan`` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from fellrec.functional.cost import PartCost, human_bytes
from fellrec.planning.plan import Plan
from fellrec.report.tables import fits, text_table

_SHOWN_BY_CUT = ("split.head_layers", "split.tail_layers")
"""Overrides without a column of their own: the column ``cut`` shows them."""


@dataclass(frozen=True)
class Row:
    """One combination of values and its cost.

    Attributes:
        values: The overrides that vary over the combinations, key → value.
        plan: The cost.
    """

    values: dict[str, str]
    plan: Plan


_Column = tuple[str, Callable[[Plan], str]]
"""Heading, and the text of a plan's cell."""


def print_plans(rows: Sequence[Row], console: Console) -> None:
    """Print one line per combination; a table that is wider than the console becomes several tables."""
    console.print(_heading(rows), highlight=False, markup=False)
    console.print()
    has_probe = rows[0].plan.seconds_per_round is not None
    for title, columns in (("storage and memory", _STORAGE), ("traffic of a round", _traffic_columns(has_probe))):
        for table in _fitting(rows, title, columns, console):
            console.print(table)
            console.print()
    console.print(_notes(rows), highlight=False, markup=False)


def _heading(rows: Sequence[Row]) -> str:
    plans = [row.plan for row in rows]
    models = {f"{plan.backbone} with {plan.num_parameters:,} parameters" for plan in plans}
    data = {f"{plan.data} with {plan.num_clients} clients, {plan.cohort_size} a round" for plan in plans}
    loads = {
        f"{plan.load.mean.num_steps:,.1f} steps and {plan.load.mean.num_tokens:,.0f} padded tokens a client and round "
        "(means over clients)"
        for plan in plans
    }
    return "; ".join(found.pop() for found in (models, data, loads) if len(found) == 1)


def _cut(plan: Plan) -> str:
    return f"{plan.head.num_layers}+{plan.body.num_layers}+{plan.tail.num_layers}"


def _both(of_part: Callable[[PartCost], float]) -> Callable[[Plan], str]:
    return lambda plan: _two(of_part(plan.client), of_part(plan.server))


def _two(first: float, second: float) -> str:
    return f"{human_bytes(first)}\n{human_bytes(second)}"


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f} %"


def _fractions(client: float) -> str:
    return f"{_percent(client)}\n{_percent(1 - client)}"


_STORAGE = (
    ("", lambda plan: "client\nserver"),
    ("weights", _both(lambda part: part.weight_bytes)),
    ("fraction", lambda plan: _fractions(plan.client_weight_share)),
    ("saved", lambda plan: _percent(1 - plan.client_weight_share)),
    ("adapter", _both(lambda part: part.adapter_bytes)),
    ("optimiser", _both(lambda part: part.optimizer_bytes)),
    ("gradients", _both(lambda part: part.gradient_bytes)),
    ("activations", _both(lambda part: part.activation_bytes)),
    ("peak memory", lambda plan: _two(plan.client_peak_bytes, plan.server_peak_bytes)),
    ("compute", lambda plan: _fractions(plan.client_compute_share)),
)


def _traffic_columns(has_probe: bool) -> tuple[_Column, ...]:
    columns = (
        ("", lambda plan: "up\ndown"),
        ("hidden", lambda plan: _two(plan.traffic.hidden_up_bytes, plan.traffic.hidden_down_bytes)),
        ("gradients", lambda plan: _two(plan.traffic.gradient_up_bytes, plan.traffic.gradient_down_bytes)),
        ("adapters", lambda plan: _two(plan.traffic.adapter_up_bytes, plan.traffic.adapter_down_bytes)),
        ("scalars", lambda plan: _two(plan.traffic.scalar_up_bytes, plan.traffic.scalar_down_bytes)),
        ("per client", lambda plan: _two(plan.traffic.up_bytes, plan.traffic.down_bytes)),
        ("all clients", _of_all_clients),
        ("cuts/adapters", _ratio),
        ("checkpoint", lambda plan: human_bytes(plan.checkpoint_bytes)),
    )
    return (*columns, ("s/round", lambda plan: f"{plan.seconds_per_round:.3g}")) if has_probe else columns


def _of_all_clients(plan: Plan) -> str:
    return _two(plan.traffic.up_bytes * plan.cohort_size, plan.traffic.down_bytes * plan.cohort_size)


def _ratio(plan: Plan) -> str:
    ratio = plan.cut_to_adapter_ratio
    return "" if ratio is None else f"{ratio:,.3g}" if ratio < 100 else f"{ratio:,.0f}"


def _fitting(rows: Sequence[Row], title: str, columns: Sequence[_Column], console: Console) -> list[Table]:
    """One table, or several with some of the columns each, so that no number is truncated."""
    table = _table(rows, title, columns)
    if fits(table, console) or len(columns) <= 2:
        return [table]
    label, *others = columns
    half = (len(others) + 1) // 2
    rest = title if title.endswith("continued") else f"{title}, continued"
    return [
        *_fitting(rows, title, [label, *others[:half]], console),
        *_fitting(rows, rest, [label, *others[half:]], console),
    ]


def _table(rows: Sequence[Row], title: str, columns: Sequence[_Column]) -> Table:
    swept = [key for key in rows[0].values if key not in _SHOWN_BY_CUT]
    left = [*(key.rpartition(".")[2] for key in swept), "cut"]
    cells = [
        [*(row.values[key] for key in swept), _cut(row.plan), *(cell(row.plan) for _, cell in columns)] for row in rows
    ]
    return text_table(title, [*left, *(heading for heading, _ in columns)], cells, num_left=len(left) + 1)


def _ranks_text(plan: Plan) -> str:
    """How many clients have which LoRA rank, and how many bytes it has; empty if all have one rank."""
    groups: dict[tuple[int, int], int] = {}
    for client in plan.clients:
        key = client.rank, client.head_bytes + client.body_bytes + client.tail_bytes
        groups[key] = groups.get(key, 0) + 1
    if len(groups) < 2:
        return ""
    shown = ", ".join(f"{count} of rank {rank} ({human_bytes(size)})" for (rank, size), count in sorted(groups.items()))
    return f"LoRA ranks: clients {shown}. Traffic is their mean; adapter, optimiser and memory are of the largest rank."


def _heads_text(plan: Plan) -> str:
    """How many clients have which head; empty if all have one."""
    if len(plan.clients_by_head) < 2:
        return ""
    shown = ", ".join(f"{count} with {depth}" for depth, count in sorted(plan.clients_by_head.items()))
    return f"Layers in the head: clients {shown}. Each line is as if all clients had its head."


def _notes(rows: Sequence[Row]) -> str:
    plans = [row.plan for row in rows]
    shapes = sorted({plan.micro_batch for plan in plans})
    shown = ", ".join(f"{num_rows} x {tokens}" for num_rows, tokens in shapes)
    at_once = ", ".join(str(number) for number in sorted({plan.settings.clients_at_once for plan in plans}))
    notes = [
        "cut: layers of head + body + tail. Head and tail are on the client, with embedding, norm and LM head.",
        "hidden, gradients: hidden states and their gradients, which cross the two cuts. cuts/adapters: traffic "
        "through the cuts divided by traffic of adapters.",
        "Exact: weights, adapter, optimiser (AdamW), gradients, checkpoint, steps, bytes of every message. "
        "Traffic is the mean over clients, without evaluation.",
        f"Estimated: activations (saved for the backward pass of the largest micro-batch, {shown} tokens, with fused "
        "attention), peak memory (activations, weights, adapter, optimiser and gradients; on the server for "
        f"{at_once} clients at a time), compute (fraction of the forward FLOPs).",
    ]
    together = ", ".join(str(number) for number in sorted({plan.settings.clients_per_step for plan in plans} - {1}))
    if together:
        notes.append(f"Peak memory is that of trainer.clients_per_step={together} clients, activations are of one.")
    if any(plan.settings.transport == "none" for plan in plans):
        notes.append("split.transport=none runs all parts in one process; the numbers are those of a split deployment.")
    for precision in sorted({plan.settings.precision for plan in plans} - {"32-true"}):
        notes.append(f"Activations are counted in backbone.dtype, without the casts of trainer.precision={precision}.")
    if any(plan.settings.keeps_item_vectors for plan in plans):
        notes.append(
            "Cached item vectors are computed without gradients, outside the local steps; their tokens, memory and "
            "compute are not counted. With objective.freeze_items_after above 0 the numbers are of the first rounds."
        )
    if any(plan.load.is_sampled for plan in plans):
        notes.append("Tokens were counted on a sample of the batches and scaled to all.")
    if not all(plan.has_own_tokenizer for plan in plans):
        notes.append(
            "Tokens are estimates: the model has no tokenizer files here, one trained on the catalogue is used."
        )
    if any(plan.load.mean.num_losses for plan in plans):
        numbers = ", ".join(sorted({f"{plan.load.mean.num_losses:.3g}" for plan in plans}))
        notes.append(
            f"Losses that clients measure before they train are counted in traffic: {numbers} a client that trains."
        )
    for of_clients in (_ranks_text, _heads_text):
        notes += list(dict.fromkeys(text for plan in plans if (text := of_clients(plan))))
    notes += list(dict.fromkeys(plan.privacy for plan in plans if plan.privacy))
    if any(plan.seconds_per_round is not None for plan in plans):
        notes.append(
            "s/round: median step of the largest client times the number of steps, on this machine; losses that are "
            "measured are estimated from it."
        )
    return "\n".join(notes)
