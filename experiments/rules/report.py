"""The table of rules: of each cell of `sweep.sh` the candidate that validation selects.

python experiments/rules/report.py OUT/DATA

Writes ``rules.csv`` and ``rules.md`` into the folder, which has one directory per rule.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from fellrec.report.provenance import measured_line, text_of_comparison
from fellrec.report.tables import display_name, markdown

METRIC = "ndcg_at_10"
REFERENCES = ("local", "centralized")


def frame(out: Path) -> pd.DataFrame:
    """Numbers, one row per rule; the best mean first."""
    paths = sorted(out.glob("*/comparison/comparison.json"))
    if not paths:
        raise SystemExit(f"{out} contains no finished comparison")
    chosen = {path.parts[-3]: _best(json.loads(path.read_text())) for path in paths}
    references = {name: _clients(chosen[name]) for name in REFERENCES if name in chosen}
    rows = [_row(name, line, references) for name, line in chosen.items()]
    return pd.DataFrame(rows).sort_values("mean", ascending=False, ignore_index=True)


def _best(comparison: dict[str, Any]) -> dict[str, Any]:
    """The line that is best on validation."""
    learned = [line for line in comparison["rules"].values() if line["kind"] == "learned"]
    return {**max(learned, key=lambda line: line["validation"]), "tried": len(learned)}


def _clients(line: dict[str, Any]) -> pd.Series:
    """The metric of each client, mean over seeds."""
    return pd.DataFrame([run["per_client"][METRIC] for run in line["runs"]]).mean()


def _row(name: str, line: dict[str, Any], references: dict[str, pd.Series]) -> dict[str, Any]:
    mean, runs = line["mean"], line["runs"]
    shares = {f"worst_share_of_{other}": float((_clients(line) / best).min()) for other, best in references.items()}
    return {
        "rule": name,
        "settings": " ".join(line["rule"].split()[1:]),
        "candidates": line["tried"],
        "validation": line["validation"],
        "mean": mean[f"{METRIC}/mean"],
        "cv": mean[f"{METRIC}/coefficient_of_variation"],
        "worst": mean[f"{METRIC}/worst"],
        **shares,
        "round_mb": sum(run["cost"]["round_bytes"] for run in runs) / len(runs) / 1e6,
        "rounds": runs[0]["cost"]["num_rounds"],
        "round_seconds": line["seconds_per_round"],
    }


def text(table: pd.DataFrame) -> pd.DataFrame:
    """The numbers as formatted text."""
    shown = {
        "rule": table["rule"].map(_title),
        "settings": table["settings"],
        "NDCG@10": table["mean"].map("{:.4f}".format),
        "CV": table["cv"].map("{:.2f}".format),
        "worst client": table["worst"].map("{:.4f}".format),
        **{
            f"worst share of {name}": table[f"worst_share_of_{name}"].map("{:.0%}".format)
            for name in REFERENCES
            if f"worst_share_of_{name}" in table
        },
        "MB/round": table["round_mb"].map("{:.1f}".format),
        "s/round": table["round_seconds"].map("{:.1f}".format),
    }
    return pd.DataFrame(shown)


def _title(name: str) -> str:
    """A rule's name in tables; what follows a comma, such as a part that is switched off, stays."""
    rule, comma, rest = name.partition(",")
    return f"{display_name(rule)}{comma}{rest}"


def main(out: Path) -> None:
    table = frame(out)
    table.to_csv(out / "rules.csv", index=False)
    measured = sorted({text_of_comparison(path.parents[1]) for path in out.glob("*/comparison/comparison.json")})
    shown = markdown(text(table)) + measured_line("; ".join(measured))
    (out / "rules.md").write_text(shown)
    sys.stdout.write(shown)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
