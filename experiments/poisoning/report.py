"""The table of a poisoned client: what the honest clients lose under each rule, and each client's change.

python experiments/poisoning/report.py OUT

OUT has one comparison per kind of misbehaviour, in directories named as in ``poison.kind``. Writes ``poisoning.csv``,
``poisoning.md``, and ``clients.csv`` and ``clients.md`` with the change of each client.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fellrec.functional.rng import derive_seed
from fellrec.functional.statistics import bootstrap_intervals
from fellrec.report.provenance import measured_line, text_of_comparison
from fellrec.report.significance import SEED
from fellrec.report.tables import display_name, markdown

METRIC = "ndcg_at_10"
BEFORE = "none"
"""The kind in which all clients are honest."""


def cells(out: Path) -> dict[str, dict[str, Any]]:
    """The ``comparison.json`` of each kind; that without misbehaviour first."""
    found = {path.parts[-3]: json.loads(path.read_text()) for path in out.glob("*/comparison/comparison.json")}
    if BEFORE not in found:
        raise SystemExit(f"{out} contains no finished comparison {BEFORE}, which the others are compared with")
    return {kind: found[kind] for kind in sorted(found, key=lambda kind: kind != BEFORE)}


def frame(out: Path, found: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Numbers, one row per rule and kind; intervals are paired over the honest clients' users, averaged over seeds."""
    rows = []
    learned = {rule: line for rule, line in found[BEFORE]["rules"].items() if line["kind"] == "learned"}
    for rule, line in learned.items():
        before = _users(out / BEFORE, line)
        for kind, comparison in found.items():
            own, poisoned = comparison["rules"][rule], comparison["poisoned_clients"]
            both = pd.concat([_users(out / kind, own), before], axis=1, join="inner", keys=["now", "before"])
            honest = both[~both["before"]["client"].isin(poisoned)].sort_index()
            difference = torch.from_numpy((honest["now"][METRIC] - honest["before"][METRIC]).to_numpy(copy=True))
            low, high = bootstrap_intervals(difference[:, None], derive_seed(SEED, "bootstrap", "users"))[0].tolist()
            changes = _clients(own) - _clients(line)
            figure = f"honest_clients/{METRIC}"
            rows.append(
                {
                    "rule": rule,
                    "kind": kind,
                    "seeds": len(own["runs"]),
                    "honest": own["mean"][f"{figure}/mean"],
                    "honest_sd": own["sd"][f"{figure}/mean"],
                    "pooled_difference": float(difference.mean()),
                    "low": low,
                    "high": high,
                    "worst_honest_change": float(changes.drop(poisoned).min()),
                    "poisoned_change": float(changes[poisoned].mean()),
                    "weight": _weight(out / kind, own, poisoned),
                    **{f"client_{client}": change for client, change in changes.items()},
                }
            )
    return pd.DataFrame(rows)


def _folder(cell: Path, line: dict[str, Any], seed: int) -> Path:
    return cell / "-".join([*line["rule"].split(), f"s{seed}"])


def _clients(line: dict[str, Any]) -> pd.Series:
    """The metric of each client, mean over seeds."""
    return pd.DataFrame([run["per_client"][METRIC] for run in line["runs"]]).mean()


def _users(cell: Path, line: dict[str, Any]) -> pd.DataFrame:
    """Client and metric of each user, mean over seeds."""
    paths = [_folder(cell, line, run["seed"]) / "users.parquet" for run in line["runs"]]
    tables = [pd.read_parquet(path, columns=["user_id", "client", METRIC]) for path in paths]
    return pd.concat(tables).groupby("user_id").mean()


def _weight(cell: Path, line: dict[str, Any], poisoned: list[int]) -> float:
    """Weight that honest receivers give to the poisoned senders, mean over receivers, rounds and seeds.

    NaN for rules without a mixing matrix, and where no poisoned client was aggregated.
    """
    weights = []
    for run in line["runs"]:
        path = _folder(cell, line, run["seed"]) / "matrices.npz"
        if not path.is_file():
            return float("nan")
        with np.load(path) as found:
            for clients, matrix in zip(found["clients"], found["mixing"], strict=True):
                wrong = np.isin(clients, poisoned)
                honest = ~wrong & (clients >= 0)
                weights += [float(matrix[honest][:, wrong].sum(axis=1).mean())] if wrong.any() else []
    return float(np.mean(weights)) if weights else float("nan")


def text(table: pd.DataFrame) -> pd.DataFrame:
    """The numbers as formatted text."""
    return pd.DataFrame([_row(row) for row in table.to_dict("records")])


def _row(row: dict[str, Any]) -> dict[str, str]:
    is_before = row["kind"] == BEFORE
    return {
        "rule": display_name(row["rule"]),
        "kind": row["kind"],
        "NDCG@10 of honest clients": f"{row['honest']:.4f}" + (f" ±{row['honest_sd']:.4f}" if row["seeds"] > 1 else ""),
        "pooled change, honest users [95 %]": ""
        if is_before
        else f"{row['pooled_difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]",
        "worst honest client": "" if is_before else f"{row['worst_honest_change']:+.4f}",
        "poisoned client": "" if is_before else f"{row['poisoned_change']:+.4f}",
        "weight of the poisoned client": "" if np.isnan(row["weight"]) else f"{row['weight']:.3f}",
    }


def of_clients(table: pd.DataFrame, poisoned: list[int]) -> pd.DataFrame:
    """The change of each client's metric as text; an asterisk marks those that misbehave."""
    changed = table[table["kind"] != BEFORE]
    columns = [name for name in table.columns if name.startswith("client_")]
    shown = {"rule": changed["rule"].map(display_name), "kind": changed["kind"]}
    for name in columns:
        client = int(name.removeprefix("client_"))
        shown[f"{client}{'*' * (client in poisoned)}"] = changed[name].map("{:+.4f}".format)
    return pd.DataFrame(shown)


def main(out: Path) -> None:
    found = cells(out)
    table = frame(out, found)
    columns = [name for name in table.columns if name.startswith("client_")]
    table.drop(columns=columns).to_csv(out / "poisoning.csv", index=False)
    table[["rule", "kind", *columns]].to_csv(out / "clients.csv", index=False)
    line = measured_line(text_of_comparison(out / BEFORE))
    clients = of_clients(table, found[BEFORE]["poisoned_clients"])
    for name, shown in (("poisoning", text(table)), ("clients", clients)):
        (out / f"{name}.md").write_text(markdown(shown) + line)
        sys.stdout.write(markdown(shown) + line)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
