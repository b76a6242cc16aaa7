"""What attacks on a run have found: a table for the terminal, files, and a figure by depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from fellrec.attacks.findings import Finding
from fellrec.report.page import save_figure
from fellrec.report.plots import panels
from fellrec.report.styles import drawing
from fellrec.report.tables import text_table, write_table
from fellrec.state.files import make_folder, write_atomically, write_json

_PLACES = {"attack": "attack", "depth": "head layers", "users_per_client": "users a client"}
_TITLES = {
    "token": "token",
    "title": "title",
    "rouge_l": "ROUGE-L",
    "target": "target",
    "item_recall": "items of training",
    "member_auc": "member AUC",
    "client_at_1": "client@1",
    "client_auc": "client AUC",
}
_BY_DEPTH = ("token_at_1", "title_at_1", "rouge_l", "target_at_1", "target_at_10")
"""Panels of the figure, as far as attacks have them."""


def metric_name(metric: str) -> str:
    """The heading of a metric.

    Example:
        >>> metric_name("token_at_10"), metric_name("rouge_l"), metric_name("my_metric")
        ('token@10', 'ROUGE-L', 'my_metric')
    """
    name, mark, cutoff = metric.partition("_at_")
    return _TITLES.get(metric) or (f"{_TITLES[name]}@{cutoff}" if mark and name in _TITLES else metric)


def frame_of(findings: Sequence[Finding]) -> pd.DataFrame:
    """A row for each finding: what was attacked, and a column for each metric; empty cells for metrics it lacks.

    Args:
        findings: Of one run.
    """
    names = list(dict.fromkeys(name for finding in findings for name in finding.metrics))
    rows = [
        {place: getattr(finding, place) for place in _PLACES} | {name: finding.metrics.get(name) for name in names}
        for finding in findings
    ]
    frame = pd.DataFrame(rows, columns=[*_PLACES, *names])
    for place in list(_PLACES)[1:]:
        frame[place] = frame[place].astype("Int64")
    return frame.dropna(axis="columns", how="all")


def leakage_table(findings: Sequence[Finding], title: str) -> Table:
    """The findings for the terminal, a section for each depth."""
    text = _text(frame_of(findings))
    places = [heading for heading in _PLACES.values() if heading in text][1:]
    rows: list[Sequence[str] | None] = []
    before: tuple[str, ...] | None = None
    for _, row in text.iterrows():
        here = tuple(row[place] for place in places)
        if before is not None and here != before:
            rows.append(None)
        rows.append(list(row))
        before = here
    return text_table(title, text.columns, rows)


def write_leakage(
    folder: Path, findings: Sequence[Finding], about: Mapping[str, Any], measured_with: str
) -> list[Path]:
    """Write ``attack.json``, ``attack.csv``, ``attack.md``, and the figure ``leakage`` as PDF, SVG and PNG.

    Args:
        folder: New, or empty.
        findings: Of one run.
        about: What was attacked and how, for ``attack.json``.
        measured_with: Commit, threads and seed.

    Raises:
        StorageError: If a file cannot be written.
    """
    make_folder(folder)
    frame = frame_of(findings)
    write_json(folder / "attack.json", {**about, "findings": [finding.to_dict() for finding in findings]})
    write_table(folder, "attack", frame, _text(frame), measured_with)
    with drawing():
        figure = _by_depth(findings)
        for form in ("pdf", "svg", "png") if figure is not None else ():
            write_atomically(folder / f"leakage.{form}", save_figure(figure, form))
    return sorted(folder.iterdir())


def _by_depth(findings: Sequence[Finding]) -> Any:
    """One panel for each metric over the layers of the head; ``None`` if nothing was attacked at a depth."""
    at_depth = [finding for finding in findings if finding.depth is not None]
    depths = sorted({finding.depth for finding in at_depth if finding.depth is not None})
    shown = {}
    for metric in _BY_DEPTH:
        found = {(one.attack, one.depth): one.metrics[metric] for one in at_depth if metric in one.metrics}
        attacks = dict.fromkeys(attack for attack, _ in found)
        if found:
            shown[metric_name(metric)] = {name: [found.get((name, depth)) for depth in depths] for name in attacks}
    return panels("layers of the head", [str(depth) for depth in depths], shown) if shown else None


def _text(frame: pd.DataFrame) -> pd.DataFrame:
    """Headings and cells as text."""
    cells = {
        _PLACES.get(name) or metric_name(name): [
            "" if pd.isna(value) else str(value) if name in _PLACES else f"{value:.3f}" for value in values
        ]
        for name, values in frame.items()
    }
    return pd.DataFrame(cells)
