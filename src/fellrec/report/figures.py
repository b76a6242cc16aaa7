"""Figures of a report: clients under two rules, rounds, mixing, costs. The styles of rules are those of all figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from fellrec.report.comparison import Comparison, RuleResult
from fellrec.report.cost_tables import KINDS
from fellrec.report.styles import HATCHES, Style, metric_title, part_colours, plain, shared_legend, styles
from fellrec.report.tables import display_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rounds = Mapping[str, Sequence[pd.DataFrame]]
"""Line of a comparison → ``rounds.csv`` of each of its runs."""
_MOST_PANELS = 6
"""So many rules are compared with the reference, client by client."""
_MOST_LABELS = 12
"""So many clients are labelled, and have the deviation over their seeds."""
_MANY = 40
"""From so many clients on, lines are thin."""
_GAP = 0.04
"""Smallest distance of two labels, as a fraction of the axis."""
_ROUNDING = 1e-12
_LEAST_PART = 0.005
"""Kinds of traffic that are a smaller fraction of the largest bar are not drawn; the table has them."""
_MARKED = 10
"""So many points of a curve have markers."""


def new_figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure with panels, in inches, that reserves the space of its legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def slope_lines(comparison: Comparison) -> tuple[str, list[str]]:
    """The line that others are compared with client by client, and these: FELLRec first, at most six.

    The reference is FedAvg if it is there, else local training, else the first rule.
    """
    learned = comparison.rules("learned")
    base = next((line for line in (comparison.reference_rule, comparison.baseline) if line in learned), learned[0])
    others = [line for line in learned if line != base]
    others.sort(key=lambda line: line.partition(" ")[0] != "fellrec")
    return base, others[:_MOST_PANELS]


def slopes(comparison: Comparison, metric: str) -> Figure:
    """Each client's metric under the reference and under another rule, one panel for each other rule.

    Lines of clients that the rule serves better than the reference are solid, of others dashed.

    Args:
        comparison: With at least two learned rules.
        metric: Such as ``ndcg_at_10``.
    """
    base, others = slope_lines(comparison)
    look = styles(comparison.rules("learned"))
    columns = min(3, len(others))
    rows = -(-len(others) // columns)
    figure, grid = new_figure(rows, columns, max(3.6, 2.5 * columns + 0.6), 3.0 * rows + 0.4, sharey=True)
    for axes, line in zip(grid, others):
        before, after = _paired(comparison, line, base, metric)
        _slope(axes, before, after, (look[base], look[line]))
        is_better = _is_better(after.mean(axis=0), before.mean(axis=0))
        known = np.isfinite(before).all(axis=0) & np.isfinite(after).all(axis=0)
        axes.set_xticks([0, 1], [plain(display_name(base)), plain(display_name(line))])
        axes.set_title(f"better for {int(is_better[known].sum())} of {int(known.sum())} clients")
    for axes in grid[len(others) :]:
        axes.set_axis_off()
    for axes in grid[::columns]:
        axes.set_ylabel(f"{metric_title(metric)} of a client")
    shared_legend(figure)
    return figure


def _is_better(values: NDArray[Any], others: NDArray[Any]) -> NDArray[Any]:
    """Where values are higher, by more than rounding."""
    return values > others + _ROUNDING


def _paired(comparison: Comparison, line: str, base: str, metric: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """``[seeds, C]`` of the reference and of a line, paired by seed and variant; all runs if none are paired."""
    pairs = comparison.pairs(line, base.partition(" ")[0]) or comparison.pairs(line, base)
    pairs = [pair for pair in pairs if pair[1].name == base]
    if not pairs:
        return _of_clients(comparison.of_rule(base), metric), _of_clients(comparison.of_rule(line), metric)
    return _of_clients([b for _, b in pairs], metric), _of_clients([result for result, _ in pairs], metric)


def _of_clients(results: Sequence[RuleResult], metric: str) -> NDArray[Any]:
    return torch.stack([result.evaluation.per_client[metric] for result in results]).numpy()


def _slope(axes: Axes, before: NDArray[Any], after: NDArray[Any], look: tuple[Style, Style]) -> None:
    left, right = before.mean(axis=0), after.mean(axis=0)
    count = len(left)
    width, opacity = (0.5, 0.35) if count > _MANY else (1.0, 0.9)
    for is_better, dash, label in ((True, "-", "client, better"), (False, "--", "client, not better")):
        chosen = np.flatnonzero(_is_better(right, left) == is_better)
        if len(chosen):
            colour = look[1].colour if is_better else "#7F7F7F"
            ends = np.stack([left[chosen], right[chosen]])
            axes.plot([0, 1], ends, dash, color=colour, linewidth=width, alpha=opacity)
            axes.plot([], [], dash, color=colour, linewidth=1.0, label=label)
    if count <= _MOST_LABELS:
        for place, ends in ((0, before), (1, after)):
            if len(ends) > 1:
                deviation = ends.std(axis=0, ddof=1)
                axes.errorbar(
                    [place] * count,
                    ends.mean(axis=0),
                    deviation,
                    fmt="none",
                    color="#7F7F7F",
                    elinewidth=0.7,
                    capsize=2,
                )
    means = (float(np.nanmean(left)), float(np.nanmean(right)))
    axes.plot([0, 1], means, "-", color="black", linewidth=2.2, label="mean over clients")
    for place, value, style in zip((0, 1), means, look, strict=True):
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.8}
        axes.plot([place], [value], **style.of_point() | {"markersize": 8, **edge}, zorder=5)
    axes.set_xlim(-0.25, 1.25)
    if count <= _MOST_LABELS:
        _label_ends(axes, right)


def _label_ends(axes: Axes, values: NDArray[Any]) -> None:
    """The number of each client beside its end, moved up where two would overlap."""
    low, high = axes.get_ylim()
    previous = -np.inf
    for client in np.argsort(values):
        if np.isfinite(values[client]):
            previous = max(values[client], previous + _GAP * (high - low))
            axes.annotate(f"{client}", (1.08, previous), fontsize=7, va="center", annotation_clip=False)


def learning_curves(rounds: Rounds, metric: str) -> Figure | None:
    """Validation metric and training loss over rounds: mean over clients, ± standard deviation over seeds.

    Args:
        rounds: Of each line.
        metric: Such as ``ndcg_at_10``.

    Returns:
        ``None`` if no run has them.
    """
    column = f"val_{metric}"
    panels = {
        f"validation {metric_title(metric)},\nmean over clients": {
            line: [_by_round(table, column) for table in tables] for line, tables in rounds.items()
        },
        "training loss,\nmean over clients": {
            line: [_by_round(table, "loss") for table in tables] for line, tables in rounds.items()
        },
    }
    return _curves(panels)


def mixing_curves(rounds: Rounds) -> Figure | None:
    """How much clients take from each other over rounds: mean over clients, ± standard deviation over seeds.

    Args:
        rounds: Of each line.

    Returns:
        ``None`` if no run has them.
    """
    titles = {
        "own_weight": "own weight,\nmean over clients",
        "effective_senders": "effective senders,\nmean over clients",
    }
    panels = {
        title: {line: [_by_round(table, column) for table in tables] for line, tables in rounds.items()}
        for column, title in titles.items()
    }
    return _curves(panels)


def _by_round(table: pd.DataFrame, column: str) -> pd.Series[float]:
    """Mean over clients of a column, by round; without rounds that have none."""
    if column not in table:
        return pd.Series(dtype=float)
    shared = table[table["is_personal"] == 0]
    return shared.groupby("round")[column].mean().dropna()


def _curves(panels: Mapping[str, Mapping[str, Sequence[pd.Series[float]]]]) -> Figure | None:
    from matplotlib.ticker import MaxNLocator

    shown = {
        title: lines for title, lines in panels.items() if any(len(own) for many in lines.values() for own in many)
    }
    if not shown:
        return None
    look = styles(line for lines in panels.values() for line in lines)
    figure, grid = new_figure(1, len(shown), 3.4 * len(shown) + 0.4, 3.0)
    for axes, (title, lines) in zip(grid, shown.items(), strict=True):
        for line, many in lines.items():
            table = pd.concat([own for own in many if len(own)], axis=1) if any(map(len, many)) else pd.DataFrame()
            if table.empty:
                continue
            table = table.sort_index()
            mean, rounds = table.mean(axis=1), table.index.to_numpy()
            step = max(1, len(rounds) // _MARKED)
            axes.plot(rounds, mean, **look[line].of_line(), markevery=step, label=plain(display_name(line)))
            if table.shape[1] > 1:
                deviation = table.std(axis=1)
                axes.fill_between(rounds, mean - deviation, mean + deviation, color=look[line].colour, alpha=0.15, lw=0)
        axes.set_xlabel("round")
        axes.set_ylabel(title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    shared_legend(figure)
    return figure


def costs(comparison: Comparison) -> Figure | None:
    """Traffic of a round by kind, seconds of a round, and weights on both sides, a bar for each learned rule.

    Returns:
        ``None`` if no run has its costs.
    """
    lines = [
        line
        for line in comparison.rules("learned")
        if comparison.cost(line, lambda cost: cost.round_bytes()) is not None
    ]
    if not lines:
        return None
    figure, (traffic, seconds, weights) = new_figure(1, 3, 8.2, 1.3 + 0.28 * len(lines), sharey=True)
    total = max(_cost(comparison, line, lambda cost: cost.round_bytes()).mean() for line in lines)
    kinds = [
        kind
        for kind in KINDS
        if any(_cost(comparison, line, _kind(kind)).mean() > _LEAST_PART * total for line in lines)
    ]
    _stacked(traffic, comparison, lines, {KINDS[kind]: (_kind(kind), 1e-6) for kind in kinds})
    traffic.set_xlabel("MB of a round, all clients, up and down")
    values = [[result.seconds_per_round or np.nan for result in comparison.of_rule(line)] for line in lines]
    has_seeds = all(len(own) > 1 for own in values)
    deviations = [np.std(own, ddof=1) for own in values] if has_seeds else None
    bars: dict[str, Any] = {"color": "#BBBBBB", "edgecolor": "black", "linewidth": 0.5, "height": 0.65}
    seconds.barh(range(len(lines)), [np.mean(own) for own in values], xerr=deviations, capsize=2, **bars)
    seconds.set_xlabel(f"seconds of a round{', ± over seeds' if has_seeds else ''}")
    sides = {
        "weights on the client": lambda cost: cost.storage.client_bytes,
        "weights on the server": lambda cost: cost.storage.server_bytes,
    }
    _stacked(weights, comparison, lines, {name: (figure_of, 1e-6) for name, figure_of in sides.items()}, len(kinds))
    weights.set_xlabel("MB of weights")
    traffic.set_yticks(range(len(lines)), [plain(display_name(line)) for line in lines])
    traffic.invert_yaxis()
    shared_legend(figure)
    return figure


def _kind(kind: str) -> Callable[[Any], float]:
    return lambda cost: cost.round_bytes(kind=kind)


def _cost(comparison: Comparison, line: str, figure: Callable[[Any], float]) -> NDArray[Any]:
    """A cost of each run of a line."""
    return np.array([figure(result.cost) for result in comparison.of_rule(line) if result.cost is not None], float)


def _stacked(
    axes: Axes,
    comparison: Comparison,
    lines: Sequence[str],
    parts: Mapping[str, tuple[Callable[[Any], float], float]],
    first: int = 0,
) -> None:
    """Bars of several parts, each with a colour and a hatch of its own, beginning with those at ``first``."""
    left = np.zeros(len(lines))
    colours = part_colours(first + len(parts))[first:]
    for number, ((name, (figure, scale)), colour) in enumerate(zip(parts.items(), colours, strict=True)):
        values = np.array([_cost(comparison, line, figure).mean() * scale for line in lines])
        hatch = HATCHES[(first + number) % len(HATCHES)]
        axes.barh(
            range(len(lines)), values, left=left, height=0.65, color=colour, hatch=hatch, edgecolor="black",
            linewidth=0.5, label=name,
        )  # fmt: skip
        left += values
