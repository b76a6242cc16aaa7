"""Tables for the terminal, as Markdown and as CSV, and the main table of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console, RenderableType
from rich.padding import PaddingDimensions
from rich.table import Table
from rich.text import Text

from fellrec.aggregation.settings import TITLES
from fellrec.report.comparison import Comparison
from fellrec.report.provenance import measured_line

NAMES = {
    **TITLES,
    "random": "random",
    "popularity": "popularity",
    "client_popularity": "client popularity",
    "markov": "Markov",
    "markov_decay": "Markov, decayed",
    "item_knn": "item-kNN",
    "mf": "MF (PureSVD)",
    "pretrained": "pretrained base",
    "untrained": "untrained base",
}
"""Names of rules and reference rankers in tables, figures and MLflow; others keep their own."""

_NARROW = {"NDCG": "NDCG", "Recall": "Recall", "variance": "var", "s/round": "s/rd"}


def display_name(rule: str) -> str:
    """The name of a rule, with settings that vary after it, for tables, figures and MLflow.

    Example:
        >>> display_name("fedavg learning_rate=0.1"), display_name("my_rule")
        ('FedAvg learning_rate=0.1', 'my_rule')
    """
    base, _, rest = rule.partition(" ")
    return " ".join(part for part in (NAMES.get(base, base), rest) if part)


PLAIN: Any = {"markup": False, "emoji": False}
"""For consoles: names of data, rules and files are shown as they are, also with brackets or colons in them."""


def results_console() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    console = Console(**PLAIN)
    return console if console.is_terminal else Console(width=140, **PLAIN)


def text_table(
    title: str,
    columns: Iterable[str],
    rows: Iterable[Sequence[RenderableType] | None],
    caption: str = "",
    num_left: int = 1,
    padding: PaddingDimensions = (0, 1, 0, 0),
) -> Table:
    """A table for the terminal.

    Args:
        title: Above the table.
        columns: Headings.
        rows: Cells of each row; ``None`` starts a new section.
        caption: Below the table.
        num_left: So many columns are aligned left, the others right.
        padding: Around each cell.
    """
    table = Table(
        title=title, caption=caption, title_justify="left", caption_justify="left",
        box=box.SIMPLE_HEAD, show_edge=False, padding=padding,
    )  # fmt: skip
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < num_left else "right", no_wrap=True)
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    return table


def fits(table: Table, console: Console) -> bool:
    """Whether the console is wide enough to show every cell of a table."""
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum <= console.width


def print_first_fitting(tables: Sequence[Table], console: Console) -> None:
    """Print the first table that fits, else the last."""
    console.print(next((table for table in tables if fits(table, console)), tables[-1]))


def write_table(
    folder: Path, name: str, numbers: pd.DataFrame, text: pd.DataFrame, measured_with: str = "", note: str = ""
) -> None:
    """Write ``NAME.csv``, and ``NAME.md`` with what it was measured with, if known, and a note below the table."""
    numbers.to_csv(folder / f"{name}.csv", index=False)
    line = measured_line(measured_with) if measured_with else ""
    (folder / f"{name}.md").write_text(markdown(text) + line + note)


def markdown(frame: pd.DataFrame) -> str:
    """A table of text as Markdown."""
    header = [f"| {' | '.join(name.strip() for name in frame.columns)} |", "|---" * len(frame.columns) + "|"]
    body = [f"| {' | '.join(row)} |" for row in frame.itertuples(index=False)]
    return "\n".join([*header, *body]) + "\n"


def number_text(value: float | None, form: str) -> str:
    """A number in a format such as ``.1f``; empty without one."""
    return "" if value is None else format(value, form)


def comparison_frame(comparison: Comparison, cutoff: int) -> pd.DataFrame:
    """The main table as text, one row per rule.

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
            **({"val": number_text(comparison.validation(rule), ".4f")} if comparison.is_tuned else {}),
            f"NDCG@{cutoff}": _figure(comparison, rule, f"{ndcg}/mean"),
            "pooled": _figure(comparison, rule, f"{ndcg}/pooled"),
            f"Recall@{cutoff}": _figure(comparison, rule, f"{recall}/mean"),
            "pooled ": _figure(comparison, rule, f"{recall}/pooled"),
            "std": _figure(comparison, rule, f"{ndcg}/std"),
            "variance": f"{comparison.mean_and_sd(rule, f'{ndcg}/variance')[0]:.1e}",
            "worst": _figure(comparison, rule, f"{ndcg}/worst"),
            **({"gain": number_text(comparison.gain(rule, ndcg), "+.4f")} if has_gain else {}),
            "s/round": number_text(comparison.seconds_per_round(rule), ".1f"),
        }
        for kind in ("learned", "reference")
        for rule in comparison.rules(kind)
    ]
    return pd.DataFrame(rows)


def print_comparison(comparison: Comparison, console: Console, cutoff: int = 10) -> None:
    """Print the table; the best learned NDCG, Recall, spread and worst client are bold.

    Cells are never truncated: if the console is too narrow, each deviation goes below its mean; if that is not enough,
    headings are shortened.
    """
    frame = comparison_frame(comparison, cutoff)
    layouts = [(False, False), (True, False), (True, True)]
    print_first_fitting([_table(comparison, frame, cutoff, *layout) for layout in layouts], console)


def _table(comparison: Comparison, frame: pd.DataFrame, cutoff: int, is_stacked: bool, is_narrow: bool) -> Table:
    """The table; stacked: deviations below their means; narrow: short headings and one space between columns."""
    columns = [name for name in frame.columns if name != "kind"]
    best = _best(frame, cutoff)
    rows: list[list[RenderableType] | None] = []
    for _, of_kind in frame.groupby("kind", sort=False):
        rows += [None] if rows else []
        for row in of_kind.to_dict("records"):
            cells = {name: row[name].replace(" ±0.", "\n±.") if is_stacked else row[name] for name in columns}
            bold = {name: Text(cell, style="bold") for name, cell in cells.items() if (row["rule"], name) in best}
            rows.append(list({**cells, **bold}.values()))
    headings = [_NARROW.get(name.partition("@")[0], name) if is_narrow else name for name in columns]
    return text_table(
        f"{comparison.data}: {sum(comparison.users_per_client)} users of "
        f"{len(comparison.users_per_client)} clients, {_items_text(comparison)} ranked, {comparison.stage} holdout",
        [heading.strip() for heading in headings],
        rows,
        f"NDCG@{cutoff} and Recall@{cutoff}: mean over clients | pooled over users. std, variance, worst: "
        f"NDCG@{cutoff} over clients."
        + (f" gain: its mean difference to {display_name(comparison.baseline)}." if "gain" in frame else "")
        + (" ±: standard deviation over seeds." if frame[f"NDCG@{cutoff}"].str.contains("±").any() else "")
        + _chosen_text(comparison)
        + _start_text(comparison)
        + _cold_text(comparison)
        + (f" Measured: {comparison.measured_with}." if comparison.measured_with else ""),
        padding=0 if is_narrow else (0, 1, 0, 0),
    )


def _items_text(comparison: Comparison) -> str:
    """How many items are ranked; in a federation each client ranks those of its own data set."""
    if not comparison.members:
        return f"{comparison.num_items} items"
    return ", ".join(f"{member['items']} items of {name}" for name, member in comparison.members.items())


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
    """Write ``comparison.csv`` and ``comparison.md`` into ``folder``."""
    frame = comparison_frame(comparison, cutoff)
    write_table(folder, "comparison", frame, frame.drop(columns="kind"), comparison.measured_with)


def _figure(comparison: Comparison, rule: str, figure: str) -> str:
    mean, sd = comparison.mean_and_sd(rule, figure)
    return f"{mean:.4f} ±{sd:.4f}" if len(comparison.of_rule(rule)) > 1 else f"{mean:.4f}"


def _best(frame: pd.DataFrame, cutoff: int) -> set[tuple[str, str]]:
    learned = frame[frame["kind"] == "learned"]
    if len(learned) < 2:
        return set()
    found = set()
    for name in (f"NDCG@{cutoff}", "pooled", f"Recall@{cutoff}", "pooled ", "worst", "std", "variance"):
        values = learned[name].str.split().str[0].astype(float)
        extreme = values.min() if name in ("std", "variance") else values.max()
        found |= {(rule, name) for rule, value in zip(learned["rule"], values, strict=True) if value == extreme}
    return found
