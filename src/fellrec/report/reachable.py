"""How much of what a client could reach a rule gives it: its metric over that of centralised or of local training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from fellrec.report.comparison import Comparison
from fellrec.report.tables import display_name, print_first_fitting, text_table, write_table

REFERENCES = ("centralized", "local")
"""Rules whose results say what a client could reach: with all data, and with its own."""


@dataclass(frozen=True)
class Shares:
    """The clients' shares of what a reference reaches.

    Attributes:
        rule: Line of the comparison.
        reference: ``"centralized"`` or ``"local"``.
        metric: Such as ``ndcg_at_10``.
        per_client: Mean over seeds of the client's metric, divided by the reference's; ``None`` for a client without
            evaluated users, or for which the reference has 0.
        mean: Over clients.
        worst: Smallest.
        std: Population standard deviation over clients.
    """

    rule: str
    reference: str
    metric: str
    per_client: tuple[float | None, ...]
    mean: float
    worst: float
    std: float


def shares(comparison: Comparison, rule: str, reference: str, metric: str) -> Shares | None:
    """A rule's shares, paired by seed; ``None`` without the reference, or where it is 0 for all clients."""
    line = comparison.only_line(reference)
    pairs = comparison.pairs(rule, line) if line is not None else []
    if not pairs:
        return None
    own, other = (
        torch.stack([pair[side].evaluation.per_client[metric] for pair in pairs]).mean(dim=0).numpy() for side in (0, 1)
    )
    known = np.isfinite(own) & np.isfinite(other) & (other > 0)
    if not known.any():
        return None
    found = np.divide(own, other, out=np.full(len(own), np.nan), where=known)
    per_client = tuple(float(value) if is_known else None for value, is_known in zip(found, known, strict=True))
    kept = found[known]
    return Shares(rule, reference, metric, per_client, float(kept.mean()), float(kept.min()), float(kept.std()))


def all_shares(comparison: Comparison, metric: str) -> dict[str, dict[str, Shares]]:
    """Rule → reference → shares, for the learned rules and those references that the comparison has."""
    lines = comparison.rules("learned")
    found = {
        rule: {name: value for name in REFERENCES if (value := shares(comparison, rule, name, metric)) is not None}
        for rule in lines
    }
    return {rule: values for rule, values in found.items() if values}


def print_shares(comparison: Comparison, console: Console, cutoff: int) -> None:
    """Print the shares of NDCG@K, if the comparison has centralised or local training and another rule."""
    found = all_shares(comparison, f"ndcg_at_{cutoff}")
    references = [name for name in REFERENCES if any(name in values for values in found.values())]
    if not references or len(found) < 2:
        return
    text = _text(found, references)
    console.print()
    tables = [
        text_table(
            f"Share of what a client could reach, NDCG@{cutoff}",
            [name.strip() for name in text.columns],
            list(text.itertuples(index=False)),
            f"A client's NDCG@{cutoff} in per cent of that of {' and of '.join(map(_training, references))}: mean over "
            "clients, worst client, standard deviation over clients.",
            padding=padding,
        )
        for padding in ((0, 1, 0, 0), 0)
    ]
    print_first_fitting(tables, console)


def write_shares(comparison: Comparison, folder: Path, cutoff: int) -> None:
    """Write ``reachable.csv`` (one row per rule, reference and client) and ``reachable.md``, if there are any."""
    found = all_shares(comparison, f"ndcg_at_{cutoff}")
    references = [name for name in REFERENCES if any(name in values for values in found.values())]
    if not references or len(found) < 2:
        return
    numbers = [
        {"rule": rule, "reference": item.reference, "metric": item.metric, "client": client, "share": share}
        for rule, values in found.items()
        for item in values.values()
        for client, share in enumerate(item.per_client)
    ]
    write_table(folder, "reachable", pd.DataFrame(numbers), _text(found, references), comparison.measured_with)


def to_dict(comparison: Comparison, metric: str) -> dict[str, Any]:
    """JSON-ready: rule → reference → ``per_client``, ``mean``, ``worst``, ``std``."""
    return {
        rule: {
            name: {"per_client": list(s.per_client), "mean": s.mean, "worst": s.worst, "std": s.std}
            for name, s in values.items()
        }
        for rule, values in all_shares(comparison, metric).items()
    }


def _text(found: Mapping[str, Mapping[str, Shares]], references: list[str]) -> pd.DataFrame:
    rows = []
    for rule, values in found.items():
        row = {"rule": display_name(rule)}
        for place, name in enumerate(references):
            item, blank = values.get(name), " " * place  # columns of a frame need different names
            row |= {
                f"of {display_name(name)}": "" if item is None else f"{item.mean:.0%}",
                f"worst{blank}": "" if item is None else f"{item.worst:.0%}",
                f"std{blank}": "" if item is None else f"{item.std:.0%}",
            }
        rows.append(row)
    return pd.DataFrame(rows)


def _training(reference: str) -> str:
    return f"{display_name(reference)} training"
