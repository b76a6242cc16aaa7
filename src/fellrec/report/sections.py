"""What a report shows, in order: figures with captions, tables with notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fellrec.report.comparison import Comparison
from fellrec.report.figures import costs, learning_curves, mixing_curves, slope_lines, slopes
from fellrec.report.plots import frontier, matrices_over_rounds
from fellrec.report.report_tables import (
    ReportTable,
    clients_table,
    costs_table,
    differences_table,
    results_table,
    runs_table,
    settings_table,
)
from fellrec.report.runs import StoredRun
from fellrec.report.significance import significance_caption
from fellrec.report.styles import metric_title
from fellrec.report.tables import display_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MIXING = (
    "Own weight: what a client's next adapter has of its own. Effective senders: 1 if all weight is on one client, the "
    "number of clients if all weights are equal."
)
_COST = (
    "Means over rounds. Traffic: what clients and server send in a round of training, all clients together. Seconds: "
    "training and aggregation, wall time."
)
_NO_ROUNDS = "None of the runs has rounds.csv, which newer versions of fellrec write."


@dataclass(frozen=True)
class Drawn:
    """A figure of the page.

    Attributes:
        name: Of its file.
        figure: Of matplotlib.
        caption: What it shows.
    """

    name: str
    figure: Figure
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: Anchor.
        title: Heading.
        figures: Above the table.
        table: The table; ``None`` for none.
        note: Below the table.
        is_text: Whether the cells are words, not figures.
    """

    name: str
    title: str
    figures: Sequence[Drawn] = ()
    table: ReportTable | None = None
    note: str = ""
    is_text: bool = False


def sections_of(runs: Sequence[StoredRun], comparison: Comparison, cutoff: int) -> list[Section]:
    """The parts of the page.

    Args:
        runs: Labelled.
        comparison: Of them, with differences.
        cutoff: K of the metrics that are shown.
    """
    metric = f"ndcg_at_{cutoff}"
    title, seeds = metric_title(metric), len(comparison.seeds)
    over_seeds = " ± is the standard deviation over seeds." if seeds > 1 else ""
    differences = differences_table(comparison)
    return [
        Section(
            "results",
            "Results",
            table=results_table(comparison, cutoff),
            note=f"std, CV (coefficient of variation) and worst client: of {title} over clients. Intervals: 95 %, "
            f"percentile bootstrap over users.{over_seeds} Bold: best learned rule. Arrows: the better direction."
            + (
                " Below the line: rankers that are not trained by federated learning."
                if comparison.rules("reference")
                else ""
            ),
        ),
        _clients(comparison, metric),
        Section(
            "spread",
            "Mean against spread",
            _drawn(
                "spread",
                frontier(spread_points(comparison, metric), title),
                "Up and left is better: a higher mean and a smaller standard deviation over clients. No rule is better "
                f"in both than those that a grey line joins.{over_seeds}",
            ),
        ),
        Section(
            "differences",
            "Differences",
            table=differences,
            note=significance_caption(comparison) if differences else "",
        ),
        *_over_rounds(runs, comparison, metric),
        Section("cost", "Traffic and cost", _drawn("cost", costs(comparison), _COST), costs_table(comparison)),
        Section(
            "settings",
            "Settings that differ",
            table=settings_table(runs),
            note="All other settings are the same.",
            is_text=True,
        ),
        Section("runs", "Runs", table=runs_table(runs), is_text=True),
    ]


def _clients(comparison: Comparison, metric: str) -> Section:
    title, base = metric_title(metric), display_name(slope_lines(comparison)[0])
    seeds = f", mean over {len(comparison.seeds)} seeds" if len(comparison.seeds) > 1 else ""
    caption = (
        f"Each line is a client{seeds}: its {title} under {base} (left) and under another rule (right). Solid: the "
        f"rule is better for the client than {base}; dashed: it is not. Black: mean over clients."
        + (" Bars: standard deviation over seeds." if seeds else "")
    )
    figure = slopes(comparison, metric) if len(comparison.rules("learned")) > 1 else None
    table, note = clients_table(comparison, metric), f"{title} of each client{seeds}. Bold: best rule for the client."
    return Section("clients", "Clients", _drawn("clients", figure, caption), table, note)


def _over_rounds(runs: Sequence[StoredRun], comparison: Comparison, metric: str) -> list[Section]:
    rounds = {
        line: [run.rounds for run in runs if run.result.name == line and run.rounds is not None]
        for line in comparison.rules("learned")
    }
    has_rounds = any(rounds.values())
    bands = " Bands: standard deviation over seeds." if len(comparison.seeds) > 1 else ""
    curves = _drawn("learning", learning_curves(rounds, metric), f"Round -1 is the start.{bands}")
    mixing = [*_drawn("mixing", mixing_curves(rounds), f"{_MIXING}{bands}"), *_matrices(runs, comparison)]
    return [
        Section("rounds", "Learning curves", curves, note="" if has_rounds else _NO_ROUNDS),
        Section("mixing", "Mixing", mixing),
    ]


def spread_points(comparison: Comparison, metric: str) -> dict[str, tuple[float, float, float, float]]:
    """Each learned line's mean and standard deviation over clients, and their deviations over seeds."""
    found = {}
    for line in comparison.rules("learned"):
        (mean, mean_sd), (spread, spread_sd) = (
            comparison.mean_and_sd(line, f"{metric}/{name}") for name in ("mean", "std")
        )
        found[line] = (mean, spread, mean_sd, spread_sd)
    return found


def _drawn(name: str, figure: Figure | None, caption: str) -> list[Drawn]:
    return [] if figure is None else [Drawn(name, figure, caption)]


def _matrices(runs: Sequence[StoredRun], comparison: Comparison) -> list[Drawn]:
    """The mixing matrices of the first of the rules that are compared with the reference, of its first run."""
    base, others = slope_lines(comparison)
    for line in [*others, base]:
        run = next(run for run in runs if run.result.name == line)
        found = run.matrices()
        if "mixing" in found:
            shown = {name: found[name] for name in ("rounds", "clients", "mixing")}
            caption = (
                f"{display_name(line)}, seed {run.result.seed}: weights with which a receiver (row) averages the "
                "adapters of senders (columns), times their number: 1 is the weight in a plain mean."
            )
            return [Drawn("mixing_matrices", matrices_over_rounds(shown), caption)]
    return []


def title_of(comparison: Comparison) -> str:
    """Data and rules."""
    return f"{comparison.data}: {', '.join(map(display_name, comparison.rules('learned')))}"


def facts_of(runs: Sequence[StoredRun], comparison: Comparison) -> list[str]:
    """What was compared, in lines."""
    seeds = ", ".join(map(str, comparison.seeds))
    items = f"{comparison.num_items} items" if comparison.num_items else "items"
    facts = [
        f"{sum(comparison.users_per_client)} evaluated users of {len(comparison.users_per_client)} clients, "
        f"{items} ranked, {comparison.stage} split",
        f"{len(runs)} runs; seeds {seeds}",
    ]
    return facts + ([f"measured: {comparison.measured_with}"] if comparison.measured_with else [])
