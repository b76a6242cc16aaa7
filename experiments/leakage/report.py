"""What a server recovers: one table for each kind of attack, mean and deviation over seeds.

python experiments/leakage/report.py OUT

writes ``at_cut.md``, ``updates.md``, ``adapters.md`` and the figure ``leakage.png`` into the directory of the sweep.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from fellrec.experiment.run_dir import provenance
from fellrec.report.leakage import metric_name
from fellrec.report.plots import panels
from fellrec.report.provenance import measured_line
from fellrec.report.styles import drawing
from fellrec.report.tables import markdown

METRICS = ("token_at_1", "title_at_1", "target_at_10")
"""Of the figure."""
PLACES = {"depth": "head layers", "users_per_client": "users a client"}


def findings(out: Path) -> pd.DataFrame:
    """All figures of all runs: columns run, seed, attack, depth, users_per_client, metric, value."""
    rows = []
    for path in sorted(out.glob("*-s*/attack/attack.json")):
        run, _, seed = path.parts[-3].rpartition("-s")
        for finding in json.loads(path.read_text())["findings"]:
            about = {"run": run, "seed": int(seed)} | {key: finding[key] for key in ("attack", *PLACES)}
            rows += [about | {"metric": metric, "value": value} for metric, value in finding["metrics"].items()]
    if not rows:
        raise SystemExit(f"{out} contains no attack.json")
    return pd.DataFrame(rows)


def table(found: pd.DataFrame) -> pd.DataFrame:
    """One row for each run, attack and place, one column for each metric: mean over seeds, ± their deviation."""
    places = [name for name in PLACES if found[name].notna().any()]
    keys = ["run", *places, "attack"]
    groups = found.astype(dict.fromkeys(places, "Int64")).groupby([*keys, "metric"], sort=False)["value"]
    cells = groups.agg(_mean).unstack("metric").reindex(columns=found["metric"].unique()).fillna("").reset_index()
    cells = cells.sort_values(["run", *places], kind="stable").astype(str)
    return cells.rename(columns={**PLACES, **{name: metric_name(name) for name in found["metric"].unique()}})


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.3f}" + (f" ±{values.std():.3f}" if len(values) > 1 else "")


def draw(found: pd.DataFrame) -> Figure:
    """Recovered tokens, titles and targets of each run by layers of the head, means over seeds.

    Args:
        found: The figures of attacks at the cut.
    """
    depths = sorted(found["depth"].astype(int).unique())
    figures: dict[str, dict[str, list[float | None]]] = {}
    for run, own in found.groupby("run", sort=False):
        for metric in METRICS:
            means = own[own["metric"] == metric].groupby(["attack", "depth"], sort=False)["value"].mean()
            attacks = dict.fromkeys(attack for attack, _ in means.index)
            if attacks:
                lines = {attack: [means.get((attack, depth)) for depth in depths] for attack in attacks}
                figures[f"{run}: {metric_name(metric)}"] = lines
    return panels("layers of the head", [str(depth) for depth in depths], figures)


KINDS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "at_cut": lambda found: found["depth"].notna(),
    "updates": lambda found: found["users_per_client"].notna(),
    "adapters": lambda found: found["depth"].isna() & found["users_per_client"].isna(),
}
"""Name of a table → the figures that are in it."""


def main(out: Path) -> None:
    found = findings(out)
    first = next(out.glob(f"*-s{found['seed'].iloc[0]}"))
    line = measured_line(provenance(first).text(found["seed"]))
    for name, belongs in KINDS.items():
        own = found[belongs(found)]
        if own.empty:
            continue
        shown = table(own)
        text = markdown(shown) + line
        (out / f"{name}.md").write_text(text, encoding="utf-8")
        sys.stdout.write(f"{text}\n")
        if name == "at_cut":
            with drawing():
                draw(own).savefig(out / "leakage.png", dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
