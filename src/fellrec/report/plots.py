"""Figures: heat-maps of matrices between clients, and the comparison of rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fellrec.report.styles import Style, drawing, plain, shared_legend, styles
from fellrec.report.tables import display_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_MOST_NUMBERS = 12
"""Largest matrix whose cells are labelled with numbers."""
_MOST_LABELS = 12
"""Largest number of clients whose dots have their numbers."""
_MOST_UPRIGHT = 8
"""Largest number of rules whose names are not turned."""
_SMALL: Any = {"fontsize": 7, "ha": "center", "color": "dimgrey"}
_LABEL_GAP = 0.045
"""Smallest distance of two labels, as a fraction of the axis."""


@drawing()
def heat_map(matrix: Sequence[Sequence[float]], clients: Sequence[int], title: str, is_mixing: bool) -> Figure:
    """A square matrix between clients.

    Args:
        matrix: ``[N, N]``, receiver by sender for a mixing matrix.
        clients: Index of each row and column.
        title: Above the figure.
        is_mixing: Whether rows are receivers and columns senders.
    """
    values = np.asarray(matrix)
    figure, (axes,) = _axes(1, 1, 4.6, 4.0)
    image = axes.imshow(values, cmap="viridis", vmin=min(0.0, float(values.min())), vmax=max(1e-9, float(values.max())))
    if len(clients) <= 40:
        axes.set_xticks(range(len(clients)), clients)
        axes.set_yticks(range(len(clients)), clients)
    axes.set_xlabel("sender" if is_mixing else "client")
    axes.set_ylabel("receiver" if is_mixing else "client")
    axes.set_title(title, fontsize=10)
    if len(clients) <= _MOST_NUMBERS:
        _write_cells(axes, image, values)
    figure.colorbar(image, ax=axes, shrink=0.85)
    return figure


def _write_cells(axes: Axes, image: AxesImage, values: NDArray[Any]) -> None:
    """The number in each cell, so that the figure can be read in grey: white on dark colours, black on light ones."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = image.to_rgba(np.array([value]))[0]
            colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=7)


@drawing()
def matrices_over_rounds(found: Mapping[str, NDArray[Any]]) -> Figure:
    """Every matrix in the first, the middle and the last round, one scale a matrix.

    A mixing matrix is shown as ``N W[receiver, sender]``: 1, in white, is the weight that every sender has in a plain
    mean; what counts more is red, what counts less blue.

    Args:
        found: ``rounds`` ``[R]``, ``clients`` ``[R, N]`` (-1 for none), and matrices ``[R, N, N]``.
    """
    names = [name for name in found if name not in ("rounds", "clients")]
    places = sorted({0, len(found["rounds"]) // 2, len(found["rounds"]) - 1})
    figure, grid = _axes(len(names), len(places), 3.4 * len(places) + 0.8, 3.2 * len(names))
    for index, name in enumerate(names):
        row = grid[index * len(places) : (index + 1) * len(places)]
        is_mixing = name.startswith("mixing")
        sizes = (found["clients"] >= 0).sum(axis=1)
        shown = [found[name][place][: sizes[place], : sizes[place]] for place in places]
        shown = [matrix * len(matrix) if is_mixing else matrix for matrix in shown]
        values = np.concatenate([matrix[np.isfinite(matrix)].ravel() for matrix in shown])
        low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
        if is_mixing:
            most = max(abs(low - 1), abs(high - 1), 1e-9)
            low, high = 1 - most, 1 + most
        image = None
        for axes, matrix, place in zip(row, shown, places, strict=True):
            colours = "RdBu_r" if is_mixing else "viridis"
            image = axes.imshow(matrix, cmap=colours, vmin=low, vmax=max(high, low + 1e-9))
            axes.set_title(f"{name}{' × N' if is_mixing else ''}, round {found['rounds'][place]}", fontsize=9)
            clients = found["clients"][place][: sizes[place]]
            if len(clients) <= _MOST_NUMBERS:
                axes.set_xticks(range(len(clients)), clients)
                axes.set_yticks(range(len(clients)), clients)
                _write_cells(axes, image, matrix)
            axes.set_xlabel("sender" if is_mixing else "client", fontsize=8)
            axes.set_ylabel("receiver" if is_mixing else "client", fontsize=8)
        if image is not None:
            figure.colorbar(image, ax=row, shrink=0.85)
    return figure


@drawing()
def client_dots(values: Mapping[str, Sequence[float]], metric: str, references: Mapping[str, float]) -> Figure:
    """One dot per client and rule, the mean as a bar, reference rankers as dashed lines.

    Args:
        values: Line of a comparison → the metric of each client.
        metric: Axis label.
        references: Reference ranker → its mean over clients.
    """
    figure, (axes,) = _axes(1, 1, 1.6 + 1.1 * max(4, len(values)), 4.0)
    look = styles(values)
    for position, (line, per_client) in enumerate(values.items()):
        spread = np.linspace(-0.18, 0.18, len(per_client)) if len(per_client) > 1 else np.zeros(1)
        is_small = len(per_client) > _MOST_LABELS
        dots = {"markersize": 2.5 if is_small else 6, "alpha": 0.6 if is_small else 1.0}
        axes.plot(position + spread, per_client, **look[line].of_point() | dots)
        if not is_small:
            for client, (offset, value) in enumerate(zip(spread, per_client, strict=True)):
                axes.annotate(f"{client}", (position + offset, value), (0, 6), textcoords="offset points", **_SMALL)
        axes.hlines(float(np.nanmean(per_client)), position - 0.3, position + 0.3, color="black", linewidth=1.5)
    axes.set_xticks(range(len(values)), [plain(display_name(line)).replace(" ", "\n") for line in values])
    axes.tick_params(axis="x", labelrotation=30 if len(values) > _MOST_UPRIGHT else 0)
    axes.set_ylabel(f"{metric} of a client")
    axes.set_ylim(bottom=0)
    axes.set_title("a dot for each client, with its number; bar: mean over clients", fontsize=9)
    _label_references(axes, references)
    return figure


@drawing()
def frontier(points: Mapping[str, tuple[float, ...]], metric: str) -> Figure:
    """Mean over clients against spread, one point a rule; the rules that no other is better than in both are joined.

    Args:
        points: Line of a comparison → mean and standard deviation over clients; then, if there are several seeds, the
            standard deviations of both over seeds.
        metric: Axis label.
    """
    figure, (axes,) = _axes(1, 1, 5.6, 4.2)
    draw_frontier(axes, points, metric)
    shared_legend(figure)
    return figure


def draw_frontier(
    axes: Axes,
    points: Mapping[str, tuple[float, ...]],
    metric: str,
    spread: str = "standard deviation of {}",
    look: Mapping[str, Style] | None = None,
    labels: Mapping[str, str] | None = None,
) -> None:
    """The content of `frontier`, for figures with several panels.

    Args:
        axes: To draw on.
        points: See `frontier`.
        metric: Axis label.
        spread: What the second value of a point is, with a place for the metric.
        look: The styles of the rules of all panels; ``None`` for those of the points.
        labels: Rule → what it is called, if not by its own name.
    """
    look, best = look or styles(points), pareto(points)
    line = sorted((points[rule][1], points[rule][0]) for rule in best)
    if len(line) > 1:
        axes.plot(*zip(*line), "-", color="#BBBBBB", linewidth=2.5, zorder=0, label="no rule is better in both")
    for rule, (mean, deviation, *over_seeds) in points.items():
        if any(over_seeds):
            errors: dict[str, Any] = {"fmt": "none", "elinewidth": 0.8, "capsize": 2, "color": look[rule].colour}
            axes.errorbar(deviation, mean, yerr=over_seeds[0], xerr=over_seeds[1], **errors)
        axes.plot(
            [deviation],
            [mean],
            **look[rule].of_point() | {"markersize": 7},
            label=plain((labels or {}).get(rule, display_name(rule))),
        )
    axes.set_xlabel(f"{spread.format(metric)} over clients")
    axes.set_ylabel(f"mean of {metric} over clients")
    axes.margins(x=0.15, y=0.25)
    axes.annotate(
        "better", (0.015, 0.985), (0.1, 0.9), "axes fraction", fontsize=8, style="italic", color="#444444", va="center",
        arrowprops={"arrowstyle": "->", "color": "#444444"},
    )  # fmt: skip


def pareto(points: Mapping[str, tuple[float, ...]]) -> list[str]:
    """Rules that no other rule is better than in one of mean (higher) and spread (smaller) and as good in the other.

    Example:
        >>> pareto({"a": (0.5, 0.2), "b": (0.4, 0.1), "c": (0.4, 0.3)})
        ['a', 'b']
    """

    def is_better(other: tuple[float, ...], own: tuple[float, ...]) -> bool:
        """Whether another rule has at least the mean and at most the spread, and one of them is better."""
        return other[0] >= own[0] and other[1] <= own[1] and other != own

    return [rule for rule, own in points.items() if not any(is_better(other, own) for other in points.values())]


@drawing()
def panels(axis: str, points: Sequence[str], figures: Mapping[str, Mapping[str, Sequence[float | None]]]) -> Figure:
    """Several figures over the same points, one panel each, one line per series.

    Args:
        axis: Label of the points.
        points: Label of each point, in order.
        figures: Title of a panel → rule → its value at each point; ``None`` for a point without a value.
    """
    look = styles(rule for series in figures.values() for rule in series)
    columns = min(3, len(figures))
    rows = -(-len(figures) // columns)
    figure, grid = _axes(rows, columns, 3.2 * columns, 2.6 * rows)
    for axes, (title, series) in zip(grid, figures.items()):
        for name, values in series.items():
            shown = [np.nan if value is None else value for value in values]
            axes.plot(range(len(points)), shown, **look[name].of_line(), label=plain(display_name(name)))
        axes.set_xticks(range(len(points)), map(plain, points), fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1.0)
        axes.set_xlabel(axis, fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
    for axes in grid[len(figures) :]:
        axes.set_visible(False)
    shared_legend(figure)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure as PNG."""
    with drawing():
        figure.savefig(path, dpi=120, bbox_inches="tight")


def _label_references(axes: Axes, references: Mapping[str, float]) -> None:
    """Draw a dashed line per ranker with its name beside it, moved up where it would cover the name below."""
    bottom, top = axes.get_ylim()
    top = max(top, 1.05 * max(references.values(), default=0.0))
    axes.set_ylim(bottom, top)
    previous = -1.0
    for name, value in sorted(references.items(), key=lambda item: item[1]):
        height = (value - bottom) / (top - bottom)
        previous = max(height, previous + _LABEL_GAP)
        axes.axhline(value, linestyle="--", linewidth=0.8, color="grey", zorder=0)
        axes.annotate(
            plain(display_name(name)), (1.0, height), (1.05, previous), "axes fraction", fontsize=8, color="dimgrey",
            va="center", arrowprops={"arrowstyle": "-", "color": "lightgrey", "linewidth": 0.8},
        )  # fmt: skip


def _axes(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)
