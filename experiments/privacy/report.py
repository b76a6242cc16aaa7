"""What privacy costs: one table by ε, one by noise in hidden states and depth of the head.

python experiments/privacy/report.py OUT

writes ``epsilon.md`` and ``noise.md`` into the directory of the sweep.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from fellrec.report.tables import markdown

METRIC = "ndcg_at_10"


def results(folder: Path) -> dict[str, Any]:
    """The results of a run, with the mean over clients on validation in its last round."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    rounds = pd.read_csv(folder / "rounds.csv")
    found["last"] = rounds.groupby("round")[f"val_{METRIC}"].mean().dropna().iloc[-1]
    finished = json.loads((folder / "finished.json").read_text())
    return {**found, "best_round": finished["best_round"]}


def by_epsilon(out: Path) -> pd.DataFrame:
    """One row for each rule and ε."""
    rows = []
    for folder in sorted(out.glob("epsilon_*")):
        found, (_, *rule, epsilon) = results(folder), folder.name.split("_")
        private = found.get("privacy", {})
        rows.append(
            {
                "rule": "_".join(rule),
                "ε planned": float("inf") if epsilon == "none" else float(epsilon),
                "ε spent": private.get("epsilon"),
                "noise multiplier": private.get("noise_multiplier"),
                **_accuracy(found),
            }
        )
    return pd.DataFrame(rows).sort_values(["rule", "ε planned"], ascending=[True, False])


def by_noise(out: Path) -> pd.DataFrame:
    """One row for each depth and noise, with the best attack of those that were made on the first cut."""
    rows = []
    for folder in sorted(out.glob("noise_*")):
        _, depth, noise = folder.name.split("_")
        rows.append({"head layers": int(depth), "noise": float(noise), **_accuracy(results(folder)), **_leaked(folder)})
    return pd.DataFrame(rows).sort_values(["head layers", "noise"])


def _accuracy(found: dict[str, Any]) -> dict[str, Any]:
    summary = found["summary"]
    return {
        "NDCG@10": summary[f"{METRIC}/mean"],
        "std over clients": summary[f"{METRIC}/std"],
        "round tested": found["best_round"],
        "val NDCG@10, last round": found["last"],
    }


def _leaked(folder: Path) -> dict[str, float]:
    findings = json.loads((folder / "attack" / "attack.json").read_text())["findings"]
    table = {finding["attack"]: finding for finding in findings}
    attacks = [table[name] for name in ("nearest_embedding", "logit_lens") if name in table]
    names = {"token@1": "token_at_1", "title@1": "title_at_1"}
    found = {shown: max(attack[name] for attack in attacks) for shown, name in names.items()}
    return {**found, "token@1, chance": table["chance"]["token_at_1"]}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if pd.isna(value) else f"{value:.4g}"


def main(out: Path) -> None:
    """Write and print both tables."""
    for name, table in (("epsilon", by_epsilon(out)), ("noise", by_noise(out))):
        text = markdown(table.map(_text))
        (out / f"{name}.md").write_text(f"{text}\n", encoding="utf-8")
        sys.stdout.write(f"{text}\n\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
