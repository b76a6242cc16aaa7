"""Tables of `sweep.sh` by domain, and what FELLRec's matrices say of the domains.

python experiments/cross_domain/report.py OUT

Writes ``domains.md`` (every rule's metric in each domain) and ``attention.md`` (similarity and weight of a client in
the same domain and of one in another, first and last round) into OUT, which has one directory per comparison.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fellrec.report.tables import display_name, markdown

METRIC = "ndcg_at_10"


def cells(out: Path) -> dict[str, dict[str, Any]]:
    """The ``comparison.json`` of each cell by name."""
    found = {path.parts[-3]: json.loads(path.read_text()) for path in sorted(out.glob("*/comparison/comparison.json"))}
    if not found:
        raise SystemExit(f"{out} contains no finished comparison")
    return found


def domains(found: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row per cell and rule, as text."""
    rows = []
    for cell, comparison in found.items():
        for rule, line in comparison["rules"].items():
            figures = {name: f"member/{name}/{METRIC}/mean" for name in comparison["members"]}
            figures |= {"mean over clients": f"{METRIC}/mean", "worst client": f"{METRIC}/worst"}
            values = {title: (line["mean"][name], line["sd"][name]) for title, name in figures.items()}
            several = len(line["runs"]) > 1
            texts = {title: f"{mean:.4f}" + f" ±{sd:.4f}" * several for title, (mean, sd) in values.items()}
            rows.append({"cell": cell, "rule": display_name(rule), **texts})
    return pd.DataFrame(rows)


def attention(out: Path, found: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row per cell, line of FELLRec and round, means over clients and seeds, as text."""
    rows = []
    for cell, comparison in found.items():
        domain = _domain_of_client(comparison)
        for rule, line in comparison["rules"].items():
            folders = [out / cell / "-".join([*rule.split(), f"s{run['seed']}"]) for run in line["runs"]]
            matrices = [dict(np.load(path)) for folder in folders if (path := folder / "matrices.npz").is_file()]
            if not rule.startswith("fellrec") or not matrices:
                continue
            for place in (0, -1):
                own = [weights(each["similarity"][place], each["mixing"][place], domain) for each in matrices]
                figures = pd.DataFrame(own).mean()
                texts = {name: "" if np.isnan(value) else f"{value:.3f}" for name, value in figures.items()}
                number = str(int(matrices[0]["rounds"][place]) + 1)
                rows.append({"cell": cell, "rule": display_name(rule), "round": number, **texts})
    return pd.DataFrame(rows)


def weights(
    similarity: NDArray[np.float64], mixing: NDArray[np.float64], domain: NDArray[np.int64]
) -> dict[str, float]:
    """Means over receivers.

    Args:
        similarity: ``[C, C]``.
        mixing: ``[C, C]``, rows are receivers and sum to 1.
        domain: ``[C]`` domain of each client.

    Returns:
        Similarity and weight of one other client of the same domain and of one of another domain, NaN without such
        clients; and the weight of the client's own adapter.
    """
    is_same = (domain[:, None] == domain[None, :]) & ~np.eye(len(domain), dtype=bool)
    is_other = domain[:, None] != domain[None, :]
    return {
        "similarity, same domain": _mean(similarity[is_same]),
        "similarity, another domain": _mean(similarity[is_other]),
        "own weight": float(np.diag(mixing).mean()),
        "weight of a client of the same domain": _mean(mixing[is_same]),
        "weight of a client of another domain": _mean(mixing[is_other]),
    }


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _domain_of_client(comparison: dict[str, Any]) -> NDArray[np.int64]:
    domain = np.full(len(comparison["users_per_client"]), -1)
    for place, member in enumerate(comparison["members"].values()):
        domain[member["clients"]] = place
    return domain


def main(out: Path) -> None:
    found = cells(out)
    for name, table in (("domains", domains(found)), ("attention", attention(out, found))):
        shown = markdown(table)
        (out / f"{name}.md").write_text(shown)
        sys.stdout.write(f"\n{shown}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
