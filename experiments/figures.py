"""Draws the committed figures again from the tables of results in the documentation.

python experiments/figures.py [FIGURE ...]

The runs behind these figures are not in the repository, but their means, deviations over seeds and coefficients of
variation are, in the tables beside them. Without a name, all figures are drawn.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pandas as pd
from matplotlib.figure import Figure

from fellrec.report.styles import drawing, shared_legend, styles
from fellrec.report.tables import NAMES

HERE = Path(__file__).resolve().parent
RULES = {
    **{title: name for name, title in NAMES.items()},
    "plain mean": "uniform",
    "neither: plain mean": "uniform",
    "attention alone": "fellrec heating=false",
    "heating alone": "fellrec attention=false",
    "both, raw parameters": "fellrec similarity=parameters",
    "released code": "fellrec fidelity=released_code",
    "update mixing, o = 0.2 (chosen with seed 0)": "updatemixing own=0.2",
    "update mixing, o = 0 (the default; chosen over three seeds)": "updatemixing own=0",
    "update mixing, o = 0.2, η = 1.5 (chosen)": "updatemixing own=0.2 step=1.5",
    "update mixing, o = 0, η = 1 (the default)": "updatemixing own=0",
    "update mixing, o = 0, η = 1.5": "updatemixing own=0 step=1.5",
}
"""What a rule is called in a table → the rule, with its settings."""
MEAN = "NDCG@10, mean over clients"


def tables(path: Path) -> list[pd.DataFrame]:
    """The tables of a page in Markdown, as text."""
    found, rows = [], list[list[str]]()
    for line in [*path.read_text(encoding="utf-8").splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
        elif rows:
            found.append(pd.DataFrame(rows[2:], columns=rows[0]))
            rows = []
    return found


def points(table: pd.DataFrame) -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    """Mean, coefficient of variation and the mean's deviation over seeds of each rule; and what it is called."""
    found, labels = {}, {}
    for row in table.to_dict("records"):
        rule = RULES.get(row["rule"], row["rule"])
        mean, _, deviation = row[MEAN].partition(" ±")
        found[rule], labels[rule] = (float(mean), float(row["CV"]), float(deviation), 0.0), row["rule"]
    return found, {rule: re.sub(r" \(.*", "", label) for rule, label in labels.items()}


def of_pages(page: Path, titles: Sequence[str]) -> Figure:
    """One panel for each table of a page with means and coefficients of variation over clients."""
    shown = [table for table in tables(page) if {MEAN, "CV"} <= set(table.columns)]
    labels: dict[str, str] = {}
    panels = {}
    for title, table in zip(titles, shown, strict=True):
        panels[title], own = points(table)
        labels |= own
    return _module(HERE / "report.py").frontiers(panels, labels)


def main_table() -> Figure:
    """One panel for each cell of the main table."""
    table = next(table for table in tables(HERE / "main_table" / "README.md") if MEAN in table.columns)
    cells = {cell: points(some) for cell, some in table.groupby("cell", sort=False)}
    labels = {rule: label for _, own in cells.values() for rule, label in own.items()}
    return _module(HERE / "report.py").frontiers({cell: found for cell, (found, _) in cells.items()}, labels)


def gains() -> dict[str, pd.DataFrame]:
    """Differences to FedAvg in every comparison over three seeds that has intervals.

    Returns:
        Setting → a row for each rule of `GAINS`: ``gain``, ``low`` and ``high``, the difference of NDCG@10 pooled over
        users to FedAvg and its 95 % interval over users, in percent of FedAvg's.
    """
    page = [t for t in tables(HERE.parent / "docs" / "does_fellrec_help.md") if {MEAN, "CV"} <= set(t.columns)]
    found = {f"SASRec, tuned: {name}": table for name, table in zip(BOTH, page, strict=True)}
    main = next(table for table in tables(HERE / "main_table" / "README.md") if MEAN in table.columns)
    found |= {CELLS[str(cell)]: table for cell, table in main.groupby("cell", sort=False)}
    domains = pd.concat(table for table in tables(HERE / "cross_domain" / "README.md") if MEAN in table.columns)
    for cell, clients in (("tiny_2", "two clients"), ("tiny_1", "one client")):
        found[f"films, games and toys: {clients} of each"] = domains[domains["cell"] == cell]
    return {title: _gains(table) for title, table in found.items()}


def _gains(table: pd.DataFrame) -> pd.DataFrame:
    pooled = next(column for column in table.columns if column.startswith("pooled") and "difference" not in column)
    difference = next(column for column in table.columns if column.startswith("pooled difference"))
    rows = {RULES.get(row["rule"], row["rule"]): row for row in table.to_dict("records")}
    base = float(rows["fedavg"][pooled]) / 100
    numbers = {rule: [float(n) / base for n in _NUMBER.findall(rows[rule][difference])] for rule in GAINS}
    return pd.DataFrame.from_dict(numbers, orient="index", columns=["gain", "low", "high"])


def draw_gains() -> Figure:
    """One line for each setting, with a point and an interval for each rule."""
    found = gains()
    figure = Figure(figsize=(7.2, 0.62 * len(found) + 1.0), layout="constrained")
    axes, look = figure.subplots(), styles(GAINS)
    for place, table in enumerate(found.values()):
        for number, rule in enumerate(GAINS):
            row = table.loc[rule]
            axes.errorbar(
                row["gain"],
                place + 0.22 * (number - 1),
                xerr=[[row["gain"] - row["low"]], [row["high"] - row["gain"]]],
                **look[rule].of_point(),
                label=NAMES[rule] if place == 0 else None,
            )
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_yticks(range(len(found)), list(found))
    axes.invert_yaxis()
    axes.set_xlabel("NDCG@10 over all users, difference to FedAvg in % of FedAvg, with 95 % intervals")
    shared_legend(figure)
    return figure


def split_depth() -> Figure:
    """The measured and the planned cost by the depth of the head."""
    measured, planned = (table.astype(float) for table in tables(HERE / "split_depth" / "README.md")[:2])
    return _module(HERE / "split_depth" / "report.py").draw(measured, planned)


def _module(path: Path) -> ModuleType:
    """A script of this folder."""
    spec = importlib.util.spec_from_file_location(f"experiments_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BOTH = ("MovieLens-1M", "Amazon Games")
GAINS = ("local", "uniform", "fellrec")
"""The rules of the figure of differences to FedAvg."""
CELLS = {
    f"{data}_{family}": f"{family}: {name}"
    for family in ("retrieval", "generative")
    for data, name in (("ml_1m", "MovieLens-1M"), ("games", "Amazon Games"), ("micro_lens_shaped", "generated"))
}
"""Cells of the main table → how a figure calls them."""
_NUMBER = re.compile(r"[-+]\d+\.\d+")
FIGURES: dict[str, Callable[[], Figure]] = {
    "ablation/ablation.png": lambda: of_pages(HERE / "ablation" / "README.md", BOTH),
    "does_fellrec_help/gains.png": draw_gains,
    "does_fellrec_help/report.png": lambda: of_pages(HERE.parent / "docs" / "does_fellrec_help.md", BOTH),
    "main_table/main_table.png": main_table,
    "split_depth/split_depth.png": split_depth,
}


def main(names: Sequence[str]) -> None:
    with drawing():
        for name in names or FIGURES:
            FIGURES[name]().savefig(HERE / name, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main(sys.argv[1:])
