"""The report of finished runs: one HTML page that needs no other file, and figures and tables for a paper."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fellrec.errors import printable
from fellrec.report.comparison import Comparison
from fellrec.report.report_tables import ReportTable
from fellrec.report.runs import StoredRun
from fellrec.report.sections import Drawn, Section, facts_of, sections_of, title_of
from fellrec.report.styles import drawing
from fellrec.state.files import make_folder, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "report.html"
_LATEX = {"±": r"$\pm$", "Δ": r"$\Delta$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--", "−": "$-$"}
_FOR_PAPERS = ("results", "differences", "cost")
"""Tables that are also written as LaTeX."""


def write_report(runs: Sequence[StoredRun], comparison: Comparison, cutoff: int, folder: Path) -> list[Path]:
    """Write ``report.html``, ``figures/*.pdf``, ``tables/*.csv`` and ``tables/*.tex``.

    Args:
        runs: Labelled.
        comparison: Of them, with differences.
        cutoff: K of the metrics that are shown.
        folder: Target directory.

    Returns:
        The files, the page first.

    Raises:
        StorageError: If a file cannot be written.
    """
    with drawing():
        sections = [
            section
            for section in sections_of(runs, comparison, cutoff)
            if section.figures or section.table or section.note
        ]
        files = {PAGE: _html(title_of(comparison), facts_of(runs, comparison), sections).encode()}
        for drawn in (drawn for section in sections for drawn in section.figures):
            files[f"figures/{drawn.name}.pdf"] = save_figure(drawn.figure, "pdf")
    for table in (section.table for section in sections if section.table is not None):
        files[f"tables/{table.name}.csv"] = table.numbers.to_csv(None, index=False).encode()
        if table.name in _FOR_PAPERS:
            files[f"tables/{table.name}.tex"] = latex(table).encode()
    for name in ("figures", "tables"):
        make_folder(folder / name)
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


def _html(title: str, facts: Sequence[str], sections: Sequence[Section]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("fellrec.report"), autoescape=True, undefined=StrictUndefined, finalize=_visible
    )
    shown: list[dict[str, Any]] = [
        {
            **{name: getattr(section, name) for name in ("name", "title", "table", "note", "is_text")},
            "figures": [{"svg": Markup(_inline(drawn)), "caption": drawn.caption} for drawn in section.figures],
        }
        for section in sections
    ]
    return environment.get_template("report.html").render(title=title, facts=facts, sections=shown)


def _visible(value: Any) -> Any:
    """Control characters of names as text; HTML does not allow them. What is escaped already stays."""
    return printable(value) if type(value) is str else value


def _inline(drawn: Drawn) -> str:
    """The figure as an element of the page."""
    text = save_figure(drawn.figure, "svg").decode()
    return text[text.index("<svg") :]


def save_figure(figure: Figure, form: str) -> bytes:
    """The content of a figure's file, which depends on the figure alone; where its parts are is decided once.

    Args:
        figure: To be saved.
        form: ``"svg"``, ``"pdf"`` or ``"png"``.
    """
    buffer = io.BytesIO()
    dates: Mapping[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    figure.savefig(buffer, format=form, metadata=dates.get(form), dpi=150)
    figure.set_layout_engine("none")
    return buffer.getvalue()


def latex(table: ReportTable) -> str:
    r"""A table for LaTeX with ``\usepackage{booktabs}``; the best values are bold."""
    frame = table.text.map(lambda cell: _escaped(cell.replace("\n", " ")))
    for row, column in table.best:
        frame.iloc[row, frame.columns.get_loc(column)] = rf"\textbf{{{frame.iloc[row][column]}}}"
    frame.columns = [_escaped(name) for name in frame.columns]
    return str(frame.to_latex(index=False, escape=False, column_format="l" + "r" * (len(frame.columns) - 1)))


def _escaped(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    plain = "".join(special.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in printable(text))
    for letter, command in _LATEX.items():
        plain = plain.replace(letter, command)
    return plain
