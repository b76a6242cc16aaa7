"""The main table of a comparison: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from fellrec.metrics.summary import HONEST
from fellrec.report.comparison import MAIN_FIGURES, Comparison, RuleResult
from fellrec.report.tables import (
    display_name,
    number_text,
    print_first_fitting,
    text_table,
    without_empty_columns,
    write_table,
)

_NARROW = {"s/round": "s/rd", "CPU s/round": "CPU\ns"}
_DIRECTIONS = {
    **dict.fromkeys(("val", "NDCG", "Recall", "honest", "worst", "gain"), "↑"),
    **dict.fromkeys(("std", "CV", "s/round", "CPU s/round"), "↓"),
}
"""Columns, without a cutoff → whether higher or lower is better."""
_MARK = " *: best of the learned rules."
_BASES = ("pretrained", "untrained")
"""Reference rankers that are the model before training."""


def comparison_numbers(comparison: Comparison, cutoff: int) -> pd.DataFrame:
    """The main table as numbers, one row per rule; columns in which nothing is known are left out.

    Args:
        comparison: Results.
        cutoff: K of NDCG@K and Recall@K.

    Returns:
        ``rule`` and ``kind``; ``seeds``, their number; figures such as ``ndcg_at_10_mean``, means over seeds, each with
        its sample standard deviation over seeds, such as ``ndcg_at_10_mean_sd``.
    """
    rows = []
    for kind in ("learned", "reference"):
        for rule in comparison.rules(kind):
            row: dict[str, Any] = {"rule": rule, "kind": kind, "seeds": len(comparison.of_rule(rule))}
            row["validation"] = comparison.validation(rule)
            for metric in (f"ndcg_at_{cutoff}", f"recall_at_{cutoff}"):
                for name, figure in MAIN_FIGURES.items():
                    mean, sd = comparison.mean_and_sd(rule, f"{metric}/{figure}")
                    row |= {f"{metric}_{name}": mean, f"{metric}_{name}_sd": sd}
                if comparison.poisoned:
                    mean, sd = comparison.mean_and_sd(rule, f"{HONEST}/{metric}/mean")
                    row |= {f"{metric}_honest": mean, f"{metric}_honest_sd": sd}
                row[f"{metric}_gain_over_local"] = comparison.gain(rule, metric)
            row["seconds_per_round"] = comparison.seconds_per_round(rule)
            row["cpu_seconds_per_round"] = comparison.cpu_seconds_per_round(rule)
            rows.append(row)
    return pd.DataFrame(rows).dropna(axis="columns", how="all")


def comparison_frame(comparison: Comparison, cutoff: int) -> pd.DataFrame:
    """The main table as text, one row per rule; columns without a cell are left out.

    Args:
        comparison: Results.
        cutoff: K of NDCG@K and Recall@K.
    """
    ndcg, recall = f"ndcg_at_{cutoff}", f"recall_at_{cutoff}"
    has_gain = any(result.rule == comparison.baseline for result in comparison.results)
    rows = [
        {
            "kind": kind,
            "rule": display_name(rule),
            "val": number_text(comparison.validation(rule), ".4f") if comparison.is_tuned else "",
            f"NDCG@{cutoff}": _figure(comparison, rule, f"{ndcg}/mean"),
            f"NDCG@{cutoff} pooled": _figure(comparison, rule, f"{ndcg}/pooled"),
            f"Recall@{cutoff}": _figure(comparison, rule, f"{recall}/mean"),
            f"Recall@{cutoff} pooled": _figure(comparison, rule, f"{recall}/pooled"),
            "honest": _figure(comparison, rule, f"{HONEST}/{ndcg}/mean") if comparison.poisoned else "",
            "std": _figure(comparison, rule, f"{ndcg}/std"),
            "CV": number_text(_finite(comparison.mean_and_sd(rule, f"{ndcg}/coefficient_of_variation")[0]), ".2f"),
            "worst": _figure(comparison, rule, f"{ndcg}/worst"),
            "gain": number_text(comparison.gain(rule, ndcg), "+.4f") if has_gain else "",
            **_seconds(comparison, rule),
        }
        for kind in ("learned", "reference")
        for rule in comparison.rules(kind)
    ]
    return without_empty_columns(pd.DataFrame(rows))


def _seconds(comparison: Comparison, rule: str) -> dict[str, str]:
    """Processor time where it is known of all runs: other work on the machine hardly changes it."""
    if comparison.has_cpu_seconds:
        return {"CPU s/round": number_text(comparison.cpu_seconds_per_round(rule), ".1f")}
    return {"s/round": number_text(comparison.seconds_per_round(rule), ".1f")}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def print_comparison(comparison: Comparison, console: Console, cutoff: int = 10) -> None:
    """Print the table; the best learned value of a column is bold, in plain text marked by an asterisk.

    Cells are never truncated: if the console is too narrow, each deviation goes below its mean; if that is not enough,
    headings are shortened.
    """
    frame = comparison_frame(comparison, cutoff)
    layouts = [(False, False), (True, False), (True, True)]
    is_plain = console.color_system is None
    tables = [_table(comparison, frame, cutoff, *layout, is_plain=is_plain) for layout in layouts]
    print_first_fitting(tables, console)
    if note := reading_note(comparison, cutoff):
        console.print(note, highlight=False)


def _table(
    comparison: Comparison, frame: pd.DataFrame, cutoff: int, is_stacked: bool, is_narrow: bool, is_plain: bool
) -> Table:
    """The table; stacked: deviations below their means; narrow: short headings and one space between columns."""
    columns = [name for name in frame.columns if name != "kind"]
    best = best_cells(frame)
    rows: list[list[RenderableType] | None] = []
    for _, of_kind in frame.groupby("kind", sort=False):
        rows += [None] if rows else []
        for row in of_kind.to_dict("records"):
            cells = {name: row[name].replace(" ±0.", "\n±.") if is_stacked else row[name] for name in columns}
            if is_plain and not is_narrow:
                cells = {name: _marked(cell, name, (row["rule"], name) in best) for name, cell in cells.items()}
            bold = {name: Text(cell, style="bold") for name, cell in cells.items() if (row["rule"], name) in best}
            rows.append(list({**cells, **bold}.values()))
    return text_table(
        f"{comparison.data}: {sum(comparison.users_per_client)} users of "
        f"{len(comparison.users_per_client)} clients, {_items_text(comparison)} ranked, {comparison.stage} holdout",
        [_heading(name, is_narrow, is_plain) for name in columns],
        rows,
        table_caption(comparison, cutoff)
        + (" *: best of the learned rules." if is_plain and best and not is_narrow else ""),
        padding=0 if is_narrow else (0, 1, 0, 0),
    )


def _items_text(comparison: Comparison) -> str:
    """How many items are ranked; in a federation each client ranks those of its own data set."""
    if not comparison.members:
        return f"{comparison.num_items} items"
    return ", ".join(f"{member['items']} items of {name}" for name, member in comparison.members.items())


def _heading(name: str, is_narrow: bool, is_plain: bool) -> str:
    """The metric above, the figure and its direction below: ↑ is better when higher, ↓ when lower."""
    space = " " if is_plain and not is_narrow and _is_marked(name) else ""  # where cells have an asterisk
    metric, _, figure = name.partition(" ")
    arrow = _direction(name)
    if "@" in metric:
        return f"{metric.partition('@')[0] if is_narrow else metric}\n{figure or 'mean'}{arrow}{space}"
    return f"{_NARROW.get(name, name) if is_narrow else name}{arrow}{space}"


def _direction(name: str) -> str:
    """The arrow of a column: higher or lower is better; empty for text."""
    return _DIRECTIONS.get(name.partition("@")[0], "")


def _is_marked(name: str) -> bool:
    """Whether the best cell of a column is marked."""
    return name not in ("rule", "val") and "s/round" not in name


def _marked(cell: str, name: str, is_best: bool) -> str:
    """A cell with an asterisk after its first line, or a space, so that figures stay below each other."""
    first, *below = cell.split("\n")
    return (
        "\n".join([f"{first}{'*' if is_best else ' '}", *(f"{line} " for line in below)]) if _is_marked(name) else cell
    )


def table_caption(comparison: Comparison, cutoff: int) -> str:
    """Explanation of the columns, and what a reader of the table must know."""
    frame = comparison_frame(comparison, cutoff)
    return (
        f"NDCG@{cutoff} and Recall@{cutoff}: mean over clients, and pooled over users. std, CV (std / mean), worst: "
        f"NDCG@{cutoff} over clients."
        + (f" honest: the mean over clients without {_clients_text(comparison)}." if comparison.poisoned else "")
        + (f" gain: its mean difference to {display_name(comparison.baseline)}." if "gain" in frame else "")
        + (" ±: standard deviation over seeds." if frame[f"NDCG@{cutoff}"].str.contains("±").any() else "")
        + _identical_text(comparison)
        + _chosen_text(comparison)
        + _start_text(comparison)
        + _cold_text(comparison)
        + (f" Measured: {comparison.measured_with}." if comparison.measured_with else "")
    )


def _clients_text(comparison: Comparison) -> str:
    """The clients that misbehave."""
    numbers = ", ".join(map(str, comparison.poisoned))
    return f"poisoned client{'s' * (len(comparison.poisoned) > 1)} {numbers}"


def reading_note(comparison: Comparison, cutoff: int) -> str:
    """How to read rankers that count and beat every learned rule; empty if none does."""
    figure = f"ndcg_at_{cutoff}/mean"
    learned = [comparison.mean_and_sd(rule, figure)[0] for rule in comparison.rules("learned")]
    best = max(learned, default=math.inf)
    counting = [
        display_name(rule)
        for rule in comparison.rules("reference")
        if rule not in (*_BASES, "random", "client_popularity") and comparison.mean_and_sd(rule, figure)[0] > best
    ]
    if not counting:
        return ""
    bases = [display_name(rule) for rule in comparison.rules("reference") if rule in _BASES]
    why = "synthetic users mostly step from an item to its fixed successor, and " * (comparison.data == "synthetic")
    return (
        f"How to read this: {'; '.join(counting)} {'beats' if len(counting) == 1 else 'beat'} the learned rules by "
        f"counting the interactions of all clients in one place, without federation ({why}counts are hard to beat on "
        f"few data), so compare the learned rules with each other{''.join(f' and with the {name}' for name in bases)}."
    )


def identical_seeds(comparison: Comparison) -> list[str]:
    """Lines whose runs all have the same metrics for every user, though their seeds differ."""
    return [
        line
        for line in comparison.rules("learned")
        if len(found := comparison.of_rule(line)) > 1 and all(_is_same(found[0], other) for other in found[1:])
    ]


def _is_same(one: RuleResult, other: RuleResult) -> bool:
    mine, theirs = one.evaluation.per_user, other.evaluation.per_user
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _identical_text(comparison: Comparison) -> str:
    names = ", ".join(map(display_name, identical_seeds(comparison)))
    seeds = ", ".join(map(str, comparison.seeds))
    return f" Seeds {seeds} gave identical results, so ±0 is not their variation: {names}." if names else ""


def _chosen_text(comparison: Comparison) -> str:
    """The settings that validation selects; empty if no rule has several."""
    if not comparison.is_tuned:
        return ""
    chosen = ", ".join(display_name(line) for line in comparison.chosen.values())
    return f" val: selection metric on the validation split; best there: {chosen}."


def _start_text(comparison: Comparison) -> str:
    """The rules of which the start was tested; empty if there are none."""
    tested = {item.name: None for item in comparison.results if item.kind == "learned" and item.best_round == -1}
    names = ", ".join(map(display_name, tested))
    return f" Tested at the start, as no round was better on validation: {names}." if tested else ""


def _cold_text(comparison: Comparison) -> str:
    """Counts of cold items and users; empty if they are not known."""
    cold, summary = comparison.cold, comparison.results[0].evaluation.summary
    if not cold or "cold_items/num_users" not in summary:
        return ""
    return (
        f" Cold: {cold['items']} items without a training interaction, targets of "
        f"{summary['cold_items/num_users']:.0f} users; {cold['users']} users with fewer than "
        f"{cold['users_below']} training interactions."
    )


def write_tables(comparison: Comparison, folder: Path, cutoff: int = 10) -> None:
    """Write ``comparison.csv``, numbers, and ``comparison.md``, text with the best cells bold, into ``folder``."""
    frame = comparison_frame(comparison, cutoff)
    best = best_cells(frame)
    shown = frame.drop(columns="kind")
    for name in shown.columns:
        shown[name] = [f"**{c}**" if (rule, name) in best else c for rule, c in zip(frame["rule"], frame[name])]
    shown.columns = [f"{name} {arrow}".strip() for name in shown.columns for arrow in (_direction(name),)]
    write_table(folder, "comparison", comparison_numbers(comparison, cutoff), shown, comparison.measured_with)


def _figure(comparison: Comparison, rule: str, figure: str) -> str:
    mean, sd = comparison.mean_and_sd(rule, figure)
    return f"{mean:.4f} ±{sd:.4f}" if len(comparison.of_rule(rule)) > 1 else f"{mean:.4f}"


def best_cells(frame: pd.DataFrame) -> set[tuple[str, str]]:
    """Rule and column of the best values of the learned rules; none with fewer than two rules."""
    learned = frame[frame["kind"] == "learned"]
    if len(learned) < 2:
        return set()
    found = set()
    for name in (name for name in frame.columns if _direction(name) and _is_marked(name)):
        values = pd.to_numeric(learned[name].str.split().str[0], errors="coerce")
        extreme = values.min() if _direction(name) == "↓" else values.max()
        found |= {(rule, name) for rule, value in zip(learned["rule"], values, strict=True) if value == extreme}
    return found
