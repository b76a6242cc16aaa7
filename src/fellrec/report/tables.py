"""The comparison as a table: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from fellrec.report.comparison import Comparison

NAMES = {
    "local": "local",
    "fedavg": "FedAvg",
    "uniform": "uniform",
    "fellrec": "FELLRec",
    "updatemixing": "update mixing",
    "centralized": "centralised",
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
"""How rules and reference rankers are called in tables; others keep their own name."""

_NARROW = {"NDCG": "NDCG", "Recall": "Recall", "variance": "var", "s/round": "s/rd"}


def display_name(rule: str) -> str:
    """The name for tables."""
    base, _, rest = rule.partition(" ")
    return " ".join(part for part in (NAMES.get(base, base), rest) if part)


def results_console() -> Console:
    """Standard output; as wide as the table needs where it is no terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def comparison_frame(comparison: Comparison, cutoff: int) -> pd.DataFrame:
    """The table's figures as text, one row per rule.

    Args:
        comparison: Results.
        cutoff: K of NDCG@K and Recall@K.
    """
    ndcg, recall = f"ndcg_at_{cutoff}", f"recall_at_{cutoff}"
    rows = []
    for kind in ("learned", "reference"):
        for rule in comparison.rules(kind):
            gain, seconds = comparison.gain(rule, ndcg), comparison.seconds_per_round(rule)
            rows.append(
                {
                    "kind": kind,
                    "rule": display_name(rule),
                    **({"val": _optional(comparison.validation(rule))} if comparison.is_tuned else {}),
                    f"NDCG@{cutoff}": _figure(comparison, rule, f"{ndcg}/mean"),
                    "pooled": _figure(comparison, rule, f"{ndcg}/pooled"),
                    f"Recall@{cutoff}": _figure(comparison, rule, f"{recall}/mean"),
                    "pooled ": _figure(comparison, rule, f"{recall}/pooled"),
                    "std": _figure(comparison, rule, f"{ndcg}/std"),
                    "variance": f"{comparison.mean_and_sd(rule, f'{ndcg}/variance')[0]:.1e}",
                    "worst": _figure(comparison, rule, f"{ndcg}/worst"),
                    "gain": "" if gain is None else f"{gain:+.4f}",
                    "s/round": "" if seconds is None else f"{seconds:.1f}",
                }
            )
    return pd.DataFrame(rows)


def print_comparison(comparison: Comparison, console: Console, cutoff: int = 10) -> None:
    """Print the table; the best learned NDCG, Recall, spread and worst client are bold.

    Figures are never cut: where the console is too narrow, each deviation goes below its mean, then headings are
    shortened.
    """
    frame = comparison_frame(comparison, cutoff)
    layouts = [(False, False), (True, False), (True, True)]
    tables = [_table(comparison, frame, cutoff, *layout) for layout in layouts]
    unbounded = console.options.update(max_width=10_000)
    fitting = [table for table in tables if console.measure(table, options=unbounded).maximum <= console.width]
    console.print((fitting or tables[-1:])[0])


def _table(comparison: Comparison, frame: pd.DataFrame, cutoff: int, is_stacked: bool, is_narrow: bool) -> Table:
    """The table; stacked: deviations below their means; narrow: short headings and one space between columns."""
    clients = len(comparison.users_per_client)
    has_seeds = bool(frame[f"NDCG@{cutoff}"].str.contains("±").any())
    table = Table(
        title=f"{comparison.data}: {sum(comparison.users_per_client)} users of {clients} clients, "
        f"{comparison.num_items} items ranked, {comparison.stage} holdout",
        caption=f"NDCG@{cutoff} and Recall@{cutoff}: mean over clients | pooled over users. std, variance, worst: "
        f"NDCG@{cutoff} over clients. gain: its mean difference to {display_name(comparison.baseline)}."
        + (" ±: standard deviation over seeds." if has_seeds else "")
        + _chosen_text(comparison)
        + _cold_text(comparison),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0 if is_narrow else (0, 1, 0, 0),
        caption_justify="left",
    )
    columns = [name for name in frame.columns if name != "kind"]
    for name in columns:
        heading = _NARROW.get(name.partition("@")[0], name) if is_narrow else name
        table.add_column(heading.strip(), justify="left" if name == "rule" else "right", no_wrap=True)
    best = _best(frame, cutoff)
    previous = None
    for _, row in frame.iterrows():
        if previous is not None and row["kind"] != previous:
            table.add_section()
        previous = row["kind"]
        cells = [row[name].replace(" ±0.", "\n±.") if is_stacked else row[name] for name in columns]
        bold = [(row["rule"], name) in best for name in columns]
        table.add_row(*(f"[bold]{cell}[/bold]" if wins else cell for cell, wins in zip(cells, bold, strict=True)))
    return table


def _chosen_text(comparison: Comparison) -> str:
    """Which settings a tuned rule would have; empty if nothing is tuned."""
    if not comparison.is_tuned:
        return ""
    chosen = ", ".join(display_name(line) for line in comparison.chosen.values())
    return f" val: what selection looked at, on the validation holdout; best there: {chosen}."


def _cold_text(comparison: Comparison) -> str:
    """How much of what was ranked is cold; empty if that is not known."""
    cold, summary = comparison.cold, comparison.results[0].evaluation.summary
    if not cold or "cold_items/num_users" not in summary:
        return ""
    return (
        f" Cold: {cold['items']} items without a training interaction, targets of "
        f"{summary['cold_items/num_users']:.0f} users; {summary['cold_users/num_users']:.0f} users with fewer than "
        f"{cold['users_below']} training interactions."
    )


def write_tables(comparison: Comparison, folder: Path, cutoff: int = 10) -> None:
    """Write ``comparison.csv`` and ``comparison.md`` into ``folder``."""
    frame = comparison_frame(comparison, cutoff)
    frame.to_csv(folder / "comparison.csv", index=False)
    (folder / "comparison.md").write_text(markdown(frame.drop(columns="kind")))


def markdown(frame: pd.DataFrame) -> str:
    """A table of text as Markdown."""
    header = [f"| {' | '.join(name.strip() for name in frame.columns)} |", "|---" * len(frame.columns) + "|"]
    body = [f"| {' | '.join(row)} |" for row in frame.itertuples(index=False)]
    return "\n".join([*header, *body]) + "\n"


def _optional(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


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
