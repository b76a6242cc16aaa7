"""Tables for the terminal, as Markdown and as CSV; names of rules and rankers in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich import box
from rich.console import Console, RenderableType
from rich.padding import PaddingDimensions
from rich.table import Table

from fellrec.aggregation.settings import TITLES
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


def without_empty_columns(frame: pd.DataFrame) -> pd.DataFrame:
    """A table of text without the columns in which every cell is empty."""
    return frame.loc[:, (frame != "").any(axis="index")]
