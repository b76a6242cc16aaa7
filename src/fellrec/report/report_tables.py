"""The tables of a report, as numbers and as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from fellrec.functional.rng import derive_seed
from fellrec.functional.statistics import bootstrap_intervals
from fellrec.report.comparison import Comparison, Difference
from fellrec.report.cost_tables import KINDS
from fellrec.report.costs import RunCost
from fellrec.report.runs import StoredRun, differing
from fellrec.report.significance import SEED, p_text, significance_text
from fellrec.report.styles import metric_title
from fellrec.report.tables import display_name

_SHOWN = {"mean": 1, "pooled": 1, "std": -1, "coefficient_of_variation": -1, "worst": 1}
"""Figures of the main table: 1 if higher is better, -1 if lower is."""


@dataclass(frozen=True)
class ReportTable:
    """A table in its forms.

    Attributes:
        name: Of its files.
        numbers: For CSV.
        text: For the page and for LaTeX; the first column names the line.
        best: Cells of ``text`` that are emphasised: row and column.
        breaks: Rows of ``text`` with which a new group begins.
    """

    name: str
    numbers: pd.DataFrame
    text: pd.DataFrame
    best: frozenset[tuple[int, str]] = field(default_factory=frozenset)
    breaks: frozenset[int] = field(default_factory=frozenset)


def pooled_intervals(comparison: Comparison, metric: str) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals over users of each learned line's pooled metric.

    A user's metric is averaged over the seeds first; all lines have the same resamples of users.

    Args:
        comparison: Results on the same users.
        metric: Such as ``ndcg_at_10``.
    """
    lines = comparison.rules("learned")
    columns = [
        torch.stack([result.evaluation.per_user[metric].double() for result in comparison.of_rule(line)]).mean(dim=0)
        for line in lines
    ]
    found = bootstrap_intervals(torch.stack(columns, dim=1), derive_seed(SEED, "bootstrap", "users")).tolist()
    return {line: (low, high) for line, (low, high) in zip(lines, found, strict=True) if not math.isnan(low)}


def results_table(comparison: Comparison, cutoff: int) -> ReportTable:
    """The main table: accuracy and balance of each line, with intervals, and its difference to the reference.

    Args:
        comparison: With differences, see ``with_significance``.
        cutoff: K of NDCG@K and Recall@K.
    """
    metric = f"ndcg_at_{cutoff}"
    intervals = pooled_intervals(comparison, metric)
    differences = {item.rule: item for item in comparison.differences if item.metric == metric}
    lines = [(kind, line) for kind in ("learned", "reference") for line in comparison.rules(kind)]
    rows = [_row(comparison, kind, line, cutoff, intervals.get(line), differences.get(line)) for kind, line in lines]
    numbers = pd.DataFrame(rows)
    title, recall = metric_title(metric), metric_title(f"recall_at_{cutoff}")
    against = display_name(comparison.differences[0].baseline) if comparison.differences else ""
    headings = {
        f"{metric}_mean": f"{title} ↑, mean over clients",
        f"{metric}_pooled": f"{title} ↑, pooled over users [95 %]",
        f"{metric}_std": "std ↓",
        f"{metric}_coefficient_of_variation": "CV ↓",
        f"{metric}_worst": "worst client ↑",
    }
    text = []
    for row in rows:
        cells = {"rule": display_name(row["rule"])}
        for name, heading in headings.items():
            form = ".2f" if name.endswith("variation") else ".4f"
            cells[heading] = _with_sd(row[name], row[f"{name}_sd"], row["seeds"], form)
        pooled = headings[f"{metric}_pooled"]
        if row["rule"] in intervals and row["kind"] == "learned":
            cells[pooled] += "\n[{:.4f}, {:.4f}]".format(*intervals[row["rule"]])
        cells[f"{recall} ↑"] = _with_sd(
            row[f"recall_at_{cutoff}_mean"], row[f"recall_at_{cutoff}_mean_sd"], row["seeds"], ".4f"
        )
        if against:
            cells[f"minus {against}, pooled [95 %]"] = _difference(differences.get(row["rule"]))
            cells["p (Holm)"] = p_text(row["holm_p"]) if row["holm_p"] is not None else ""
        text.append(cells)
    best = {
        (number, heading)
        for name, heading in headings.items()
        for number in _best(numbers, name, _SHOWN[name.removeprefix(f"{metric}_")])
    }
    breaks = frozenset({len(comparison.rules("learned"))}) if comparison.rules("reference") else frozenset()
    return ReportTable("results", numbers, pd.DataFrame(text), frozenset(best), breaks)


def _row(
    comparison: Comparison,
    kind: str,
    line: str,
    cutoff: int,
    interval: tuple[float, float] | None,
    difference: Difference | None,
) -> dict[str, Any]:
    metric = f"ndcg_at_{cutoff}"
    row: dict[str, Any] = {"rule": line, "kind": kind, "seeds": len(comparison.of_rule(line))}
    for name in _SHOWN:
        row[f"{metric}_{name}"], row[f"{metric}_{name}_sd"] = comparison.mean_and_sd(line, f"{metric}/{name}")
    row[f"{metric}_pooled_low"], row[f"{metric}_pooled_high"] = interval or (None, None)
    recall = f"recall_at_{cutoff}"
    row[f"{recall}_mean"], row[f"{recall}_mean_sd"] = comparison.mean_and_sd(line, f"{recall}/mean")
    plain = {} if difference is None else difference.to_dict()
    for name in (
        "user_difference",
        "user_low",
        "user_high",
        "client_difference",
        "client_low",
        "client_high",
        "holm_p",
    ):
        row[name] = plain.get(name)
    return row


def _best(numbers: pd.DataFrame, name: str, sign: int) -> list[int]:
    """Rows of the learned lines that have the best value; none if there is nothing to compare."""
    learned = numbers[numbers["kind"] == "learned"]
    values = (sign * learned[name]).round(12)
    return list(learned.index[values == values.max()]) if len(learned) > 1 else []


def _with_sd(mean: float, sd: float, seeds: int, form: str) -> str:
    if math.isnan(mean):
        return ""
    return format(mean, form) + (f" ±{format(sd, form)}" if seeds > 1 else "")


def _difference(item: Difference | None) -> str:
    if item is None:
        return ""
    interval = "" if item.user_interval is None else "\n[{:+.4f}, {:+.4f}]".format(*item.user_interval)
    return f"{item.user_difference:+.4f}{interval}"


def differences_table(comparison: Comparison) -> ReportTable | None:
    """Paired differences to the reference, of NDCG and Recall; ``None`` if there is no other rule."""
    if not comparison.differences:
        return None
    numbers = pd.DataFrame([item.to_dict() for item in comparison.differences])
    text = significance_text(comparison)
    return ReportTable("differences", numbers, text[["rule", *(name for name in text.columns if name != "rule")]])


def clients_table(comparison: Comparison, metric: str) -> ReportTable:
    """Each client's evaluated users and its metric under every learned line, mean over seeds.

    In the text, clients that misbehave have an asterisk.
    """
    columns = {
        line: torch.stack([result.evaluation.per_client[metric] for result in comparison.of_rule(line)])
        .mean(dim=0)
        .tolist()
        for line in comparison.rules("learned")
    }
    users = list(comparison.users_per_client)
    numbers = pd.DataFrame({"client": range(len(users)), "users": users, **columns})
    if comparison.poisoned:
        numbers.insert(2, "poisoned", numbers.index.isin(comparison.poisoned))
    text = pd.DataFrame({"client": comparison.client_names, "users": map(str, users)})
    best: set[tuple[int, str]] = set()
    for line, values in columns.items():
        text[display_name(line)] = ["" if math.isnan(value) else f"{value:.4f}" for value in values]
    if len(columns) > 1:
        highest = pd.DataFrame(columns).max(axis=1)
        best = {
            (row, display_name(line))
            for line, values in columns.items()
            for row, v in enumerate(values)
            if v == highest[row]
        }
    return ReportTable("clients", numbers, text, frozenset(best))


def costs_table(comparison: Comparison) -> ReportTable | None:
    """Traffic, time and weights of each learned line, means over seeds; ``None`` if no run has its costs."""
    lines = [line for line in comparison.rules("learned") if comparison.cost(line, lambda cost: 0.0) is not None]
    if not lines:
        return None
    kinds = [
        kind
        for kind in KINDS
        if any(result.cost is not None and result.cost.round_bytes(kind=kind) for result in comparison.results)
    ]
    columns: dict[str, Callable[[RunCost], float | None]] = {
        "round_up_bytes": lambda cost: cost.round_bytes("up"),
        "round_down_bytes": lambda cost: cost.round_bytes("down"),
        **{f"round_{kind}_bytes": _kind(kind) for kind in kinds},
        "evaluation_bytes": lambda cost: float(cost.evaluation_bytes),
        "client_weight_bytes": lambda cost: float(cost.storage.client_bytes),
        "server_weight_bytes": lambda cost: float(cost.storage.server_bytes),
        "rounds": lambda cost: float(cost.num_rounds),
    }
    numbers = pd.DataFrame(
        [
            {
                "rule": line,
                **{name: comparison.cost(line, figure) for name, figure in columns.items()},
                "seconds_per_round": comparison.seconds_per_round(line),
            }
            for line in lines
        ]
    )
    text = pd.DataFrame({"rule": map(display_name, lines)})
    headings = {
        "round_up_bytes": "up, MB a round",
        "round_down_bytes": "down, MB a round",
        **{f"round_{kind}_bytes": f"{KINDS[kind]}, MB a round" for kind in kinds},
        "evaluation_bytes": "evaluation, MB",
        "client_weight_bytes": "weights on the client, MB",
        "server_weight_bytes": "on the server, MB",
    }
    for name, heading in headings.items():
        text[heading] = [f"{value / 1e6:.3g}" for value in numbers[name]]
    text["rounds"] = [f"{value:.0f}" for value in numbers["rounds"]]
    text["s a round"] = ["" if pd.isna(value) else f"{value:.1f}" for value in numbers["seconds_per_round"]]
    return ReportTable("cost", numbers, text)


def _kind(kind: str) -> Callable[[RunCost], float]:
    return lambda cost: cost.round_bytes(kind=kind)


def settings_table(runs: Sequence[StoredRun]) -> ReportTable | None:
    """The settings that are not the same in all lines, but the seed; ``None`` if there are none."""
    keys = [key for key in differing(runs) if key != "seed"]
    if not keys:
        return None
    of_line: dict[str, list[StoredRun]] = {}
    for run in runs:
        of_line.setdefault(run.result.name, []).append(run)
    rows = [{"setting": key, **{line: _values(key, own) for line, own in of_line.items()}} for key in keys]
    numbers = pd.DataFrame(rows)
    return ReportTable("settings", numbers, numbers.rename(columns={line: display_name(line) for line in of_line}))


def _values(key: str, runs: Sequence[StoredRun]) -> str:
    """The values of a setting in the runs of a line, which differ in seeds only; a dash where it does not exist."""
    texts = [_setting(run.settings[key]) if key in run.settings else "–" for run in runs]
    return ", ".join(dict.fromkeys(texts))


def _setting(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text.removeprefix("fellrec.")


def runs_table(runs: Sequence[StoredRun]) -> ReportTable:
    """What each run is: where, selected round, commit."""
    rows: list[Mapping[str, Any]] = [
        {
            "run": run.name,
            "rule": run.result.name,
            "seed": run.result.seed,
            "selected_round": run.result.best_round,
            "validation": run.result.validation,
            "seconds": run.result.total_seconds,
            "git_commit": run.versions.get("git_commit", ""),
            "num_threads": run.versions.get("num_threads", ""),
        }
        for run in runs
    ]
    numbers = pd.DataFrame(rows)
    text = pd.DataFrame(
        [
            {
                "run": row["run"],
                "rule": display_name(row["rule"]),
                "seed": str(row["seed"]),
                "tested round": "start" if row["selected_round"] == -1 else str(row["selected_round"]),
                "validation": "" if row["validation"] is None else f"{row['validation']:.4f}",
                "seconds": "" if row["seconds"] is None else f"{row['seconds']:.0f}",
                "commit": str(row["git_commit"])[:7],
                "threads": str(row["num_threads"]),
            }
            for row in rows
        ]
    )
    empty = [name for name in text.columns if not any(text[name])]
    return ReportTable("runs", numbers, text.drop(columns=empty))
