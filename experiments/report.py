"""One table of all cells of a sweep: results of `fellrec compare`, and significance of the differences.

python experiments/report.py OUT [RULE-OTHER ...]

OUT has one directory per comparison. Writes ``report.csv``, ``report.md`` and ``report.png`` into it. A pair such as
``persistence-fellrec`` adds the paired difference of these two rules to ``pairs.md``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from fellrec.functional.rng import derive_seed
from fellrec.functional.statistics import bootstrap_intervals, holm, wilcoxon_p
from fellrec.report.plots import draw_frontier
from fellrec.report.provenance import measured_line, text_of_comparison
from fellrec.report.significance import SEED, p_text
from fellrec.report.styles import drawing, shared_legend, styles
from fellrec.report.tables import display_name, markdown

METRIC = "ndcg_at_10"


def cells(out: Path) -> dict[str, dict[str, Any]]:
    """The ``comparison.json`` of each cell, by name of its directory, in the order in which they were finished."""
    found = sorted(out.glob("*/comparison/comparison.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"{out} contains no finished comparison")
    return {path.parts[-3]: json.loads(path.read_text()) for path in found}


def frame(found: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Numbers, one row per cell and rule."""
    rows = []
    for cell, comparison in found.items():
        differences = {item["rule"]: item for item in comparison["differences"] if item["metric"] == METRIC}
        for rule, line in comparison["rules"].items():
            mean, sd, versus = line["mean"], line["sd"], differences.get(rule, {})
            seconds = [run["total_seconds"] for run in line["runs"] if run["total_seconds"] is not None]
            rows.append(
                {
                    "cell": cell,
                    "rule": rule,
                    "kind": line["kind"],
                    "seeds": len(line["runs"]),
                    "validation": line["validation"],
                    "mean": mean[f"{METRIC}/mean"],
                    "sd": sd[f"{METRIC}/mean"],
                    "cv": mean[f"{METRIC}/coefficient_of_variation"],
                    "worst": mean[f"{METRIC}/worst"],
                    "pooled": mean[f"{METRIC}/pooled"],
                    "seconds": sum(seconds) / len(seconds) if seconds else None,
                    **{f"fedavg_{name}": versus.get(name) for name in _VERSUS},
                }
            )
    return pd.DataFrame(rows)


def measured(out: Path, found: dict[str, dict[str, Any]]) -> str:
    """The line below a table: commit, threads and seeds, of each cell if they differ."""
    texts = {cell: text_of_comparison(out / cell) for cell in found}
    same = len(set(texts.values())) == 1
    return measured_line(next(iter(texts.values())) if same else "; ".join(f"{k}: {text}" for k, text in texts.items()))


_VERSUS = (
    "client_change_percent",
    "user_difference",
    "user_low",
    "user_high",
    "holm_p",
    "cv_difference",
    "cv_low",
    "cv_high",
)


def text(table: pd.DataFrame) -> pd.DataFrame:
    """The numbers as formatted text."""
    return pd.DataFrame([_row(row) for row in table.to_dict("records")])


def _row(row: dict[str, Any]) -> dict[str, str]:
    return {
        "cell": row["cell"],
        "rule": display_name(row["rule"]),
        "NDCG@10, mean over clients": f"{row['mean']:.4f}" + (f" ±{row['sd']:.4f}" if row["seeds"] > 1 else ""),
        "CV": f"{row['cv']:.2f}",
        "worst": f"{row['worst']:.4f}",
        "pooled": f"{row['pooled']:.4f}",
        "to FedAvg": _text("{:+.0f} %", row["fedavg_client_change_percent"]),
        "pooled difference to FedAvg": _text(
            "{:+.4f} [{:+.4f}, {:+.4f}]", *(row[f"fedavg_user_{name}"] for name in ("difference", "low", "high"))
        ),
        "p": "" if pd.isna(row["fedavg_user_low"]) else p_text(row["fedavg_holm_p"]),
        "CV's difference": _text(
            "{:+.2f} [{:+.2f}, {:+.2f}]", *(row[f"fedavg_cv_{name}"] for name in ("difference", "low", "high"))
        ),
        "s/run": _text("{:.0f}", row["seconds"]),
    }


def _text(template: str, *values: float) -> str:
    """The formatted values; empty if one is missing."""
    return "" if any(map(pd.isna, values)) else template.format(*values)


def pairs(out: Path, found: dict[str, dict[str, Any]], wanted: list[tuple[str, str]]) -> pd.DataFrame:
    """Differences paired over users, averaged over seeds first; p is adjusted for all rows (Holm)."""
    rows, p_values = [], []
    for cell, comparison in found.items():
        for names in wanted:
            lines = [line for name in names if (line := _only_line(name, comparison))]
            if len(lines) < len(names):
                continue
            columns = [_per_user(out / cell, line, comparison) for line in lines]
            both = pd.concat(columns, axis=1, join="inner", keys=[0, 1]).sort_index()
            difference = torch.from_numpy((both[0] - both[1]).to_numpy(copy=True))
            interval = bootstrap_intervals(difference[:, None], derive_seed(SEED, "bootstrap", "users"))[0].tolist()
            p_values.append(wilcoxon_p(difference))
            rows.append(
                {
                    "cell": cell,
                    "difference": " − ".join(display_name(name) for name in names),
                    "pooled": f"{float(difference.mean()):+.4f}",
                    "95 % over users": _text("[{:+.4f}, {:+.4f}]", *interval),
                }
            )
    adjusted = holm(torch.tensor(p_values, dtype=torch.float64)).tolist()
    return pd.DataFrame([{**row, "p (Holm)": p_text(p)} for row, p in zip(rows, adjusted, strict=True)])


def _only_line(rule: str, comparison: dict[str, Any]) -> str | None:
    """The line of a rule with any settings; ``None`` if there is none, or several."""
    lines = [name for name in comparison["rules"] if name.partition(" ")[0] == rule]
    return lines[0] if len(lines) == 1 else None


def _per_user(folder: Path, rule: str, comparison: dict[str, Any]) -> pd.Series:
    """A rule's metric of each user, mean over its seeds."""
    seeds = [run["seed"] for run in comparison["rules"][rule]["runs"]]
    paths = [folder / "-".join([*rule.split(), f"s{seed}"]) / "users.parquet" for seed in seeds]
    tables = [pd.read_parquet(path, columns=["user_id", METRIC]).set_index("user_id")[METRIC] for path in paths]
    return pd.concat(tables, axis=1, join="inner").mean(axis=1)


def draw(table: pd.DataFrame) -> Figure:
    """Plot mean over clients by spread of each learned rule, one panel per cell; up and left is better.

    A rule looks the same in all cells, and as in every other figure of fellrec.
    """
    learned = table[table["kind"] == "learned"]
    panels = {
        cell: {row["rule"]: (row["mean"], row["cv"], row["sd"], 0.0) for row in some.to_dict("records")}
        for cell, some in learned.groupby("cell", sort=False)
    }
    return frontiers(panels)


def frontiers(
    panels: Mapping[str, Mapping[str, tuple[float, ...]]], labels: Mapping[str, str] = MappingProxyType({})
) -> Figure:
    """Mean of NDCG@10 over clients by its coefficient of variation, in several panels with one legend.

    Args:
        panels: Title → rule → mean, coefficient of variation, and the deviations of both over seeds.
        labels: Rule → what it is called, if not by its own name.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.1 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    look = styles(rule for points in panels.values() for rule in points)
    for axes, (title, points) in zip(grid, panels.items(), strict=False):
        draw_frontier(axes, points, "NDCG@10", "coefficient of variation of {}", look, labels)
        axes.set_title(title)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    shared_legend(figure)
    return figure


def main(out: Path, wanted: list[str]) -> None:
    found = cells(out)
    table = frame(found)
    table.to_csv(out / "report.csv", index=False)
    shown = markdown(text(table)) + measured(out, found)
    (out / "report.md").write_text(shown)
    with drawing():
        draw(table).savefig(out / "report.png", dpi=110)
    sys.stdout.write(shown)
    chosen = pairs(out, found, [tuple(pair.split("-", 1)) for pair in wanted])  # type: ignore[misc]
    if len(chosen):
        shown = markdown(chosen) + measured(out, found)
        (out / "pairs.md").write_text(shown)
        sys.stdout.write(f"\n{shown}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
