"""What privacy costs: tables by ε, by noise in hidden states and depth of the head, and by noise in gradients.

python experiments/privacy/report.py OUT

writes ``epsilon.md``, ``noise.md`` and ``gradients.md`` into the directory of the sweep.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from fellrec.report.tables import markdown

METRIC = "ndcg_at_10"


def results(folder: Path) -> dict[str, Any]:
    """The results of a run, with means over clients in its last round: on validation, and of the training loss."""
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    rounds = pd.read_csv(folder / "rounds.csv")
    means = rounds.groupby("round")[[f"val_{METRIC}", "loss"]].mean()
    found["last"] = {name: values.dropna().iloc[-1] for name, values in means.items()}
    finished = json.loads((folder / "finished.json").read_text())
    return {**found, "best_round": finished["best_round"]}


def findings(folder: Path) -> list[dict[str, Any]]:
    """What the attacks on a run have found."""
    found: list[dict[str, Any]] = json.loads((folder / "attack" / "attack.json").read_text())["findings"]
    return found


def by_epsilon(out: Path) -> pd.DataFrame:
    """One row for each model, rule and ε."""
    rows = []
    for folder in sorted(out.glob("epsilon_*")):
        found, (_, model, *rule, epsilon) = results(folder), folder.name.split("_")
        private = found.get("privacy", {})
        attacks = {finding["attack"]: finding["metrics"] for finding in findings(folder)}
        rows.append(
            {
                "model": model,
                "rule": "_".join(rule),
                "ε planned": float("inf") if epsilon == "none" else float(epsilon),
                "ε spent": private.get("epsilon"),
                "noise multiplier": private.get("noise_multiplier"),
                **_accuracy(found),
                "member AUC": attacks["membership"]["member_auc"],
                "calibrated": attacks["membership_calibrated"]["member_auc"],
                "without training": attacks["initial_model"]["member_auc"],
            }
        )
    return _sorted(rows, ["model", "rule", "ε planned"], [True, True, False])


def by_noise(out: Path) -> pd.DataFrame:
    """One row for each depth of the run and noise, with the best attack at every depth that was attacked."""
    rows = []
    for folder in sorted(out.glob("noise_*")):
        _, depth, noise = folder.name.split("_")
        run = {"head layers": int(depth), "noise": float(noise), **_accuracy(results(folder))}
        rows += [run | leaked for leaked in _leaked(folder)]
    return _sorted(rows, ["head layers", "attacked at", "noise"], [True, True, True])


def by_gradient_noise(out: Path) -> pd.DataFrame:
    """One row for each noise in the gradients that clients send."""
    rows = []
    for folder in sorted(out.glob("gradient_*")):
        attacks = {finding["attack"]: finding["metrics"] for finding in findings(folder)}
        rows.append(
            {
                "noise": float(folder.name.split("_")[1]),
                **_accuracy(results(folder)),
                "target@1": attacks["gradient"]["target_at_1"],
                "target@10": attacks["gradient"]["target_at_10"],
                "target@10, most popular": attacks["most_popular"]["target_at_10"],
            }
        )
    return _sorted(rows, ["noise"], [True])


def _sorted(rows: list[dict[str, Any]], columns: list[str], ascending: list[bool]) -> pd.DataFrame:
    return pd.DataFrame(rows).sort_values(columns, ascending=ascending) if rows else pd.DataFrame()


def _accuracy(found: dict[str, Any]) -> dict[str, Any]:
    summary = found["summary"]
    return {
        "NDCG@10": summary[f"{METRIC}/mean"],
        "std over clients": summary[f"{METRIC}/std"],
        "round tested": found["best_round"],
        "val NDCG@10, last round": found["last"][f"val_{METRIC}"],
        "train loss, last round": found["last"]["loss"],
    }


def _leaked(folder: Path) -> Iterator[dict[str, float]]:
    """What the best of the attacks recovers, by the depth at which the run's model was cut for them."""
    found_at = findings(folder)
    for depth in sorted({finding["depth"] for finding in found_at}):
        table = {finding["attack"]: finding["metrics"] for finding in found_at if finding["depth"] == depth}
        attacks = [table[name] for name in ("nearest_embedding", "logit_lens", "transformer_inverter")]
        names = {"token@1": "token_at_1", "title@1": "title_at_1"}
        found = {shown: max(attack[name] for attack in attacks) for shown, name in names.items()}
        yield {"attacked at": depth, **found, "token@1, chance": table["chance"]["token_at_1"]}


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if pd.isna(value) else f"{value:.4g}"


def main(out: Path) -> None:
    """Write and print the tables."""
    tables = {"epsilon": by_epsilon(out), "noise": by_noise(out), "gradients": by_gradient_noise(out)}
    for name, table in tables.items():
        if table.empty:
            continue
        text = markdown(table.map(_text))
        (out / f"{name}.md").write_text(f"{text}\n", encoding="utf-8")
        sys.stdout.write(f"{text}\n\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
