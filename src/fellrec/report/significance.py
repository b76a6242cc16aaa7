"""Statistical significance of a comparison's differences: each learned rule against the baseline."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fellrec.functional.balance import coefficient_of_variation
from fellrec.functional.rng import derive_seed
from fellrec.functional.statistics import (
    MIN_UNITS,
    bootstrap_intervals,
    holm,
    relative_change,
    spread_interval,
    wilcoxon_p,
)
from fellrec.report.comparison import Comparison, Difference, RuleResult
from fellrec.report.tables import display_name, print_first_fitting, text_table, write_table

SEED = 0
"""Seed of the bootstrap: the same results give the same intervals."""


def with_significance(comparison: Comparison, cutoff: int) -> Comparison:
    """The comparison with the differences of NDCG@K and Recall@K between each learned rule and the baseline.

    Runs are paired by seed and variant, users by their index. **Several seeds:** a user's metric, and a client's, is
    averaged over the seeds first; then users, or clients, are resampled and ranked. So the intervals measure the
    variation over users, or clients; the standard deviation over seeds is in the main table.

    Args:
        comparison: Results.
        cutoff: K.
    """
    pairs = [
        (line, metric, paired)
        for metric in (f"ndcg_at_{cutoff}", f"recall_at_{cutoff}")
        for line in comparison.rules("learned")
        if (paired := comparison.pairs(line, comparison.reference_rule)) and paired[0][0].rule != paired[0][1].rule
    ]
    found = [_difference(line, metric, paired) for line, metric, paired in pairs]
    differences = [item for item in found if item.num_users]
    adjusted = holm(torch.tensor([item.wilcoxon_p for item in differences], dtype=torch.float64)).tolist()
    return replace(
        comparison, differences=[replace(item, holm_p=p) for item, p in zip(differences, adjusted, strict=True)]
    )


def _difference(line: str, metric: str, pairs: list[tuple[RuleResult, RuleResult]]) -> Difference:
    users, base_users = (_mean_over_seeds([pair[side] for pair in pairs], metric) for side in (0, 1))
    users, base_users = users.align(base_users, join="inner")
    owner = _owner(users, pairs)
    clients, base_clients = (of_users.groupby(owner).mean() for of_users in (users, base_users))
    per_user = torch.from_numpy((users - base_users).to_numpy(copy=True))
    per_client = torch.from_numpy((clients - base_clients).to_numpy(copy=True))
    return Difference(
        rule=line,
        baseline=pairs[0][1].name,
        metric=metric,
        num_seeds=len({base.seed for _, base in pairs}),
        num_users=len(per_user),
        num_clients=len(per_client),
        user_difference=float(per_user.mean()),
        user_interval=_interval(per_user, "users"),
        user_change_percent=_finite(relative_change(float(users.mean()), float(base_users.mean()))),
        client_difference=float(per_client.mean()),
        client_interval=_interval(per_client, "clients"),
        client_change_percent=_finite(relative_change(float(clients.mean()), float(base_clients.mean()))),
        cv_difference=_spread(clients) - _spread(base_clients),
        cv_interval=_spread_interval(users, base_users, owner),
        wilcoxon_p=wilcoxon_p(per_user),
        holm_p=math.nan,
    )


def _mean_over_seeds(results: list[RuleResult], metric: str) -> pd.Series:
    """One value per user whom every run evaluated, ascending by user index."""
    columns = [
        pd.Series(result.evaluation.per_user[metric].numpy(), index=result.evaluation.users.numpy())
        for result in results
    ]
    return pd.concat(columns, axis=1, join="inner").sort_index().mean(axis=1)


def _owner(users: pd.Series, pairs: list[tuple[RuleResult, RuleResult]]) -> NDArray[np.int64]:
    """The client of each user."""
    evaluation = pairs[0][0].evaluation
    owner = pd.Series(evaluation.client_of_user.numpy(), index=evaluation.users.numpy())
    return owner.loc[users.index].to_numpy(copy=True)


def _spread(clients: pd.Series) -> float:
    return coefficient_of_variation(torch.from_numpy(clients.to_numpy(copy=True)))


def _interval(differences: Tensor, unit: str) -> tuple[float, float] | None:
    low, high = bootstrap_intervals(differences[:, None], derive_seed(SEED, "bootstrap", unit))[0].tolist()
    return None if math.isnan(low) else (low, high)


def _spread_interval(users: pd.Series, base_users: pd.Series, owner: NDArray[np.int64]) -> tuple[float, float] | None:
    values = torch.from_numpy(np.stack([users.to_numpy(), base_users.to_numpy()], axis=1))
    low, high = spread_interval(values, torch.from_numpy(owner), derive_seed(SEED, "bootstrap", "spread"))
    return None if math.isnan(low) else (low, high)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def significance_text(comparison: Comparison) -> pd.DataFrame:
    """The differences as text: with their intervals, changes in per cent, adjusted p."""
    rows = [
        {
            "metric": item.metric.replace("ndcg_at_", "NDCG@").replace("recall_at_", "Recall@"),
            "rule": display_name(item.rule),
            "Δ users": f"{item.user_difference:+.4f}",
            "95 % users": _interval_text(item.user_interval, item.num_users),
            "% users": _percent(item.user_change_percent),
            "Δ clients": f"{item.client_difference:+.4f}",
            "95 % clients": _interval_text(item.client_interval, item.num_clients),
            "% clients": _percent(item.client_change_percent),
            "Δ CV": f"{item.cv_difference:+.2f}",
            "95 % CV": "n/a" if item.cv_interval is None else "[{:+.2f}, {:+.2f}]".format(*item.cv_interval),
            "p": p_text(item.wilcoxon_p),
            "p Holm": p_text(item.holm_p),
        }
        for item in comparison.differences
    ]
    return pd.DataFrame(rows)


def print_significance(comparison: Comparison, console: Console, cutoff: int) -> None:
    """Print the differences of NDCG@K, if a rule was compared with a baseline."""
    if not comparison.differences:
        return
    frame = significance_text(comparison)
    shown = frame[frame["metric"] == f"NDCG@{cutoff}"].drop(columns=["metric", "p"])
    console.print()
    print_first_fitting([_table(shown, comparison, cutoff, is_narrow) for is_narrow in (False, True)], console)


def write_significance(comparison: Comparison, folder: Path) -> None:
    """Write ``significance.csv`` (numbers) and ``significance.md``, if a rule was compared with a baseline."""
    if comparison.differences:
        numbers = pd.DataFrame([item.to_dict() for item in comparison.differences])
        note = f"\n{significance_caption(comparison)}\n"
        write_table(folder, "significance", numbers, significance_text(comparison), comparison.measured_with, note)


def significance_caption(comparison: Comparison) -> str:
    """Explanation of the columns."""
    first = comparison.differences[0]
    seeds = f", after averaging over {first.num_seeds} seeds" if first.num_seeds > 1 else ""
    has_gap = any(None in (item.user_interval, item.client_interval) for item in comparison.differences)
    few = f" n/a: an interval needs {MIN_UNITS}." if has_gap else ""
    return (
        f"users: pooled, each user counts once; clients: mean over clients. 95 %: paired percentile bootstrap over "
        f"{first.num_users} users and {first.num_clients} clients{seeds}.{few} CV: coefficient of variation over "
        "clients; basic bootstrap over the users of each, n/a if one has fewer than "
        f"{MIN_UNITS}. p Holm: Wilcoxon signed-rank over "
        f"users, two-sided, adjusted for {len(comparison.differences)} comparisons (NDCG and Recall)."
    )


def p_text(p: float) -> str:
    """A p-value for a table.

    Example:
        >>> p_text(0.04321), p_text(2e-9), p_text(1.0)
        ('0.043', '<0.001', '1.000')
    """
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _table(frame: pd.DataFrame, comparison: Comparison, cutoff: int, is_narrow: bool) -> Table:
    """The table; narrow: an interval and a change in per cent below their difference, and one space between columns."""
    baseline = display_name(comparison.differences[0].baseline)
    below = [name for name in frame.columns if is_narrow and name.startswith(("95 %", "%"))]
    columns = frame.columns.drop(below)
    rows = []
    for row in frame.to_dict("records"):
        lines = {name: [row[name]] for name in columns}
        for name in below:
            lines[f"Δ {name.split(' ')[-1]}"].append(row[name])
        rows.append(["\n".join(cell) for cell in lines.values()])
    return text_table(
        f"NDCG@{cutoff} minus {'its ' if comparison.variants else ''}{baseline.split(' ')[0]}'s",
        columns,
        rows,
        significance_caption(comparison),
        padding=0 if is_narrow else (0, 1, 0, 0),
    )


def _interval_text(interval: tuple[float, float] | None, count: int) -> str:
    return f"n/a ({count})" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"


def _percent(value: float | None) -> str:
    return "n/a" if value is None else f"{value:+.2f} %"
