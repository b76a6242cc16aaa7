"""Cost of a split by depth k of the head: measured with the tiny backbone, planned for LLaMA-7B.

python experiments/split_depth/report.py COMPARISON.json PLAN.json FOLDER

writes ``measured.md``, ``planned.md`` and ``split_depth.png`` into the directory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from fellrec.report.provenance import measured_line, text_of_comparison
from fellrec.report.styles import Style, drawing, shared_legend
from fellrec.report.tables import markdown

CLAIMS = {"storage saved, %": 28, "compute saved, %": 48}
"""Savings on the client according to the paper: storage and training time."""
LINE_BITS = 100e6
"""Bandwidth of a client in bits per second, for the transmission time."""


def measured(comparison: dict[str, Any]) -> pd.DataFrame:
    """One row per k; split and unsplit runs side by side."""
    runs: dict[int, dict[str, dict[str, Any]]] = {}
    for line in comparison["rules"].values():
        if line["variant"]:
            variant = dict(item.split("=") for item in line["variant"].split())
            runs.setdefault(int(variant["head_layers"]), {})[variant["transport"]] = line
    return pd.DataFrame([_measured_row(k, lines["inprocess"], lines["none"]) for k, lines in sorted(runs.items())])


def _measured_row(k: int, split: dict[str, Any], whole: dict[str, Any]) -> dict[str, float]:
    cost, unsplit = split["runs"][0]["cost"], whole["runs"][0]["cost"]
    rounds = cost["measured"]
    busy = [rounds["sums"][f"{role}/busy_seconds"] for role in ("client", "server")]
    return {
        "k": k,
        "client MB": cost["client_weight_bytes"] / 1e6,
        "server MB": cost["server_weight_bytes"] / 1e6,
        "storage saved, %": 100 * (1 - cost["client_weight_share"]),
        "compute saved, %": 100 * busy[1] / sum(busy),
        "MB a round": cost["round_bytes"] / 1e6,
        "adapters alone": unsplit["round_bytes"] / 1e6,
        "s/round": _median(split, "round_seconds"),
        "unsplit": _median(whole, "round_seconds"),
        "CPU s/round": _median(split, "cpu_seconds"),
        "CPU unsplit": _median(whole, "cpu_seconds"),
        "server busy, %": 100 * rounds["server_busy_rate"],
        "NDCG@10": split["mean"]["ndcg_at_10/mean"],
        "NDCG@10 unsplit": whole["mean"]["ndcg_at_10/mean"],
        "std": split["mean"]["ndcg_at_10/std"],
    }


def _median(line: dict[str, Any], name: str) -> float:
    return median(seconds for run in line["runs"] for seconds in run["cost"]["measured"][name])


def planned(plans: list[dict[str, Any]]) -> pd.DataFrame:
    """One row per k."""
    rows = [
        {
            "k": plan["layers"]["head"],
            "k + m": plan["layers"]["head"] + plan["layers"]["tail"],
            "client GB": plan["client"]["weight_bytes"] / 1e9,
            "server GB": plan["server"]["weight_bytes"] / 1e9,
            "storage saved, %": 100 * plan["storage_saved"],
            "compute saved, %": 100 * (1 - plan["client_compute_share"]),
            "GB a client and round": plan["traffic_per_client"]["total_bytes"] / 1e9,
            "MB of adapters": (
                plan["traffic_per_client"]["adapter_up_bytes"] + plan["traffic_per_client"]["adapter_down_bytes"]
            )
            / 1e6,
            "minutes at 100 Mbit/s": plan["traffic_per_client"]["total_bytes"] * 8 / LINE_BITS / 60,
        }
        for plan in plans
    ]
    return pd.DataFrame(rows).sort_values("k", ignore_index=True)


def reached(frame: pd.DataFrame, column: str, percent: float) -> pd.Series[Any] | None:
    """The largest k that still saves this much; ``None`` if there is none."""
    enough = frame[frame[column] >= percent]
    return None if enough.empty else enough.loc[enough["k"].idxmax()]


def draw(tiny: pd.DataFrame, llama: pd.DataFrame) -> Figure:
    """Two rows for the measured runs, one for the plan; one legend: split or not, processor time or not."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    grid = figure.subplots(3, 3).flat
    panels = [
        ("client storage, MB", tiny, {"client MB": "split"}),
        ("client compute, % of busy seconds", tiny.assign(left=100 - tiny["compute saved, %"]), {"left": "split"}),
        ("traffic of a round, MB", tiny, {"MB a round": "split", "adapters alone": "not split"}),
        ("seconds of a round", tiny, _SECONDS),
        ("NDCG@10, mean over clients", tiny, {"NDCG@10": "split", "NDCG@10 unsplit": "not split"}),
        ("std of NDCG@10 over clients", tiny, {"std": "split"}),
        ("LLaMA-7B: client storage saved, %", llama, {"storage saved, %": "planned"}),
        ("LLaMA-7B: client compute saved, %", llama, {"compute saved, %": "planned"}),
        ("LLaMA-7B: GB a client and round", llama, {"GB a client and round": "planned"}),
    ]
    for axes, (title, frame, series) in zip(grid, panels, strict=True):
        for column, label in series.items():
            axes.plot(frame["k"], frame[column], **_STYLES[label].of_line(), label=label)
        axes.set_ylim(0, 1.1 * float(frame[list(series)].to_numpy().max()))
        axes.set_title(title)
        axes.set_xlabel("k, layers of the head")
        column = next(iter(series))
        if column in CLAIMS and frame is llama:
            claim, found = CLAIMS[column], reached(llama, column, CLAIMS[column])
            where = "" if found is None else f": up to k = {found['k']:.0f}"
            axes.axhline(claim, color="grey", linestyle=":", linewidth=1)
            end = (float(frame["k"].max()), claim)
            axes.annotate(f"paper: {claim} %{where}", end, (2, 3), textcoords="offset points", fontsize=8, ha="right")
    shared_legend(figure)
    return figure


_SECONDS = {"s/round": "split", "unsplit": "not split", "CPU s/round": "split, CPU", "CPU unsplit": "not split, CPU"}
_STYLES = {
    "split": Style("#0072B2", "o", "-"),
    "not split": Style("#D55E00", "X", "--"),
    "split, CPU": Style("#0072B2", "o", ":", "none"),
    "not split, CPU": Style("#D55E00", "s", "-.", "none"),
    "planned": Style("#000000", "D", "-"),
}


def table(frame: pd.DataFrame) -> str:
    """Markdown; integers unchanged, other numbers with four significant digits."""
    text = pd.DataFrame(
        {name: [f"{v:.0f}" if float(v).is_integer() and v < 1e4 else f"{v:.4g}" for v in frame[name]] for name in frame}
    )
    return markdown(text)


def claims(llama: pd.DataFrame) -> str:
    """The k at which each claim of the paper is reached, and the traffic there."""
    lines = []
    for column, percent in CLAIMS.items():
        found = reached(llama, column, percent)
        if found is None:
            lines.append(f"{column}: {percent} is reached at no k.")
            continue
        lines.append(
            f"{column}: {percent} is reached up to k = {found['k']:.0f} (k + m = {found['k + m']:.0f}), which saves "
            f"{found[column]:.1f} %; {found['GB a client and round']:.2f} GB of traffic per client and round, "
            f"{found['minutes at 100 Mbit/s']:.1f} minutes at 100 Mbit/s, compared with "
            f"{found['MB of adapters']:.1f} MB of adapters."
        )
    return "\n".join(lines) + "\n"


def main(comparison: Path, plan: Path, folder: Path) -> None:
    tiny, llama = measured(json.loads(comparison.read_text())), planned(json.loads(plan.read_text()))
    shown = table(tiny) + measured_line(text_of_comparison(comparison.parents[1]))
    (folder / "measured.md").write_text(shown)
    (folder / "planned.md").write_text(table(llama) + "\n" + claims(llama))
    with drawing():
        draw(tiny, llama).savefig(folder / "split_depth.png", dpi=110)
    sys.stdout.write(f"{shown}\n{table(llama)}\n{claims(llama)}")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
