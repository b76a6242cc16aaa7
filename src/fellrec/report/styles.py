"""What a rule looks like in every figure: one colour, one marker, one line; told apart in grey as well.

Colours are those of Okabe and Ito (2008), chosen for colour-blind readers; yellow is left out, as it is hard to see on
white. Markers differ wherever colours differ, so a figure that is printed in grey can still be read.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fellrec.aggregation.settings import TITLES
from fellrec.errors import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#E69F00", "#0072B2", "#D55E00", "#000000", "#56B4E9", "#009E73", "#CC79A7", "#7F7F7F")
"""Orange, blue, vermillion, black, sky blue, bluish green, reddish purple, grey."""
MARKERS = ("^", "o", "s", "D", "v", "P", "X", "*")
LINES = (":", "--", "-", "-.")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++")
"""Of parts of a bar, with the colours of `part_colours`."""
_FILLS = ("full", "none", "left", "right", "top", "bottom")
"""How the markers of a rule's lines are filled if it has several, with different settings."""
_FIRST = ("local", "fedavg", "fellrec", "centralized", "uniform", "persistence", "updatemixing", "fedprox")
"""Rules that most figures show: no two have the same colour or marker."""
_ORDER = (*_FIRST, *(name for name in TITLES if name not in _FIRST))
_HANDLE_INCHES, _LETTER_INCHES = 0.6, 0.065
"""Widths in a legend."""
_MOST = len(COLOURS) * len(MARKERS)

_SETTINGS: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5.5,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "fellrec",
}
"""For all figures: text stays text in SVG, fonts are embedded in PDF, the same numbers give the same file."""


@dataclass(frozen=True)
class Style:
    """How one line of a comparison is drawn.

    Attributes:
        colour: Hexadecimal.
        marker: Of matplotlib.
        line: Dashes, of matplotlib.
        fill: How the marker is filled, of matplotlib.
    """

    colour: str
    marker: str
    line: str
    fill: str = "full"

    def of_line(self) -> dict[str, Any]:
        """Arguments of ``Axes.plot``."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.line,
            "fillstyle": self.fill,
            "markerfacecoloralt": "white",
        }

    def of_point(self) -> dict[str, Any]:
        """Arguments of ``Axes.plot`` and ``Axes.errorbar`` for points that no line joins."""
        return {**self.of_line(), "linestyle": "none"}


def styles(lines: Iterable[str]) -> dict[str, Style]:
    """The style of each line of a comparison; no two are the same.

    A rule of fellrec has one style everywhere. A rule of the user's own, or an attack, has one that its name decides,
    unless another line of the figure has that, or its colour while a colour is free. Lines of one rule with different
    settings differ in how their markers are filled.

    Args:
        lines: Rules, with settings that vary after them, such as ``"fellrec alpha=0.3"``.

    Example:
        >>> found = styles(["fedavg", "fellrec alpha=0.3", "fellrec alpha=0.7"])
        >>> found["fedavg"].colour, found["fellrec alpha=0.3"].fill, found["fellrec alpha=0.7"].fill
        ('#0072B2', 'full', 'none')
        >>> styles(["fellrec"])["fellrec"] == found["fellrec alpha=0.3"]
        True
    """
    lines = list(dict.fromkeys(lines))
    places: dict[str, int] = {}
    for rule in sorted({_rule(line) for line in lines}, key=lambda rule: (rule not in _ORDER, rule)):
        places[rule] = _ORDER.index(rule) if rule in _ORDER else _free_place(rule, places.values())
    counts: dict[str, int] = {}
    found = {}
    for line in lines:
        rule = _rule(line)
        number = counts[rule] = counts.get(rule, -1) + 1
        found[line] = _style(places[rule], number)
    return found


def _free_place(rule: str, others: Collection[int]) -> int:
    """The place that a name decides, or the next free one, with a colour that is free as long as there is one."""
    colours = {other % len(COLOURS) for other in others}
    first = zlib.crc32(rule.encode()) % _MOST
    places = [(first + step) % _MOST for step in range(_MOST)]
    free = [place for place in places if place not in others] or places
    return next((place for place in free if place % len(COLOURS) not in colours), free[0])


def in_order(lines: Iterable[str]) -> list[str]:
    """Lines of a comparison in the order of their rules in figures and tables; own rules last, as they were given."""
    return sorted(lines, key=lambda line: _ORDER.index(_rule(line)) if _rule(line) in _ORDER else len(_ORDER))


def _style(place: int, number: int) -> Style:
    """The style at a place: the colour, and a marker that is shifted after every round through the colours."""
    turn, colour = divmod(place, len(COLOURS))
    line = LINES[(colour + number) % len(LINES)]
    return Style(COLOURS[colour], MARKERS[(colour + turn) % len(MARKERS)], line, _FILLS[number % len(_FILLS)])


def _rule(line: str) -> str:
    return line.partition(" ")[0]


def part_colours(count: int) -> list[str]:
    """Colours of the parts of a bar; neighbours differ in grey."""
    order = ("#0072B2", "#E69F00", "#CC79A7", "#56B4E9", "#009E73", "#7F7F7F")
    return [order[number % len(order)] for number in range(count)]


def plain(text: str) -> str:
    """A text that matplotlib shows as it is: dollar signs in a name begin no formula, control characters are escaped.

    Example:
        >>> plain("price$rank$")
        'price\\\\$rank\\\\$'
    """
    return printable(text).replace("$", r"\$")


@contextmanager
def drawing() -> Iterator[None]:
    """Draw and save figures with the same settings, whatever the user's own are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def shared_legend(figure: Figure) -> None:
    """One legend below all panels of a figure, with every label once."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        inches = _HANDLE_INCHES + _LETTER_INCHES * max(map(len, handles))
        columns = max(1, min(len(handles), int(figure.get_figwidth() / inches)))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def metric_title(metric: str) -> str:
    """The name of a metric on axes and in tables.

    Example:
        >>> metric_title("ndcg_at_10"), metric_title("recall_at_5"), metric_title("my_metric")
        ('NDCG@10', 'Recall@5', 'my_metric')
    """
    name, mark, cutoff = metric.partition("_at_")
    return f"{_METRICS[name]}@{cutoff}" if mark and name in _METRICS else metric


_METRICS = {"ndcg": "NDCG", "recall": "Recall", "hr": "HR", "mrr": "MRR"}
