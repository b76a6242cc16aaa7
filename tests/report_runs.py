"""Directories of finished runs, written without training, for tests of reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fellrec.metrics.summary import summarise

SETTINGS: Mapping[str, Any] = {
    "format": 1,
    "seed": 0,
    "run_dir": "elsewhere",
    "data": {"name": "films", "max_history": 10},
    "aggregation": {"_target_": "fellrec.aggregation.FedAvg"},
    "trainer": {"metric": "ndcg_at_10", "num_rounds": 3, "learning_rate": 0.001},
}
METRICS = ("ndcg_at_5", "recall_at_5", "ndcg_at_10", "recall_at_10")


def write_run(
    folder: Path,
    rule: str,
    seed: int,
    values: Sequence[float],
    clients: Sequence[int],
    key: str = "1234",
    name: str = "films",
    settings: Mapping[str, Mapping[str, Any]] = {},
    rounds: int = 3,
) -> Path:
    """Write a run of one user per value, who belongs to the client at the same place.

    Args:
        folder: Of the run; created.
        rule: Its name.
        seed: Of the run.
        values: Every metric of each user.
        clients: The client of each user.
        key: Of the data.
        name: Of the data.
        settings: Group → settings other than `SETTINGS`.
        rounds: Number of rounds in ``rounds.csv``, without a row of the start; 0 for no such file.
    """
    folder.mkdir(parents=True)
    count = max(clients) + 1
    of_users = {metric: torch.tensor(values, dtype=torch.float64) for metric in METRICS}
    evaluation = summarise(of_users, torch.tensor(clients), count, "test", rounds - 1)
    config = {**SETTINGS, "seed": seed, "aggregation": {"_target_": f"fellrec.aggregation.{rule}"}}
    for group, own in settings.items():
        config[group] = {**config[group], **own}
    (folder / "config.yaml").write_text(json.dumps(config))
    ids = [f"user {number}" for number in range(len(values))]
    statistics = {"items": 50, "clients": count}
    (folder / "data.json").write_text(json.dumps({"key": key, "name": name, "statistics": statistics}))
    (folder / "versions.json").write_text(json.dumps({"fellrec": "0.1.0", "git_commit": "a" * 40, "num_threads": "1"}))
    pd.DataFrame({"user_id": ids, "client": clients}).to_parquet(folder / "partition.parquet")
    users = {"user_id": ids, "client": clients, **{metric: list(values) for metric in METRICS}}
    pd.DataFrame(users).to_parquet(folder / "users.parquet")
    train_bytes = {"adapter": {"up": 3_000_000 * rounds, "down": 1_000_000 * rounds}}
    cost = {
        **{"client_weight_bytes": 4_000_000, "server_weight_bytes": 6_000_000, "train_bytes": train_bytes},
        **{"num_rounds": max(rounds, 1), "evaluation_bytes": 0, "transport": "none"},
        "measured": {"round_seconds": [2.0, 4.0], "cpu_seconds": [1.0, 1.0], "sums": {}, "peaks": {}},
    }
    results = {
        **{"stage": "test", "round_index": 2, "rule": rule.lower(), "seed": seed, "cost": cost},
        "summary": dict(evaluation.summary),
        "per_client": {metric: column.tolist() for metric, column in evaluation.per_client.items()},
    }
    (folder / "results.json").write_text(json.dumps(results))
    if rounds:
        rows = [
            {
                **{"round": number, "client": client, "is_personal": 0, "loss": 3.0 - number + seed},
                **{"own_weight": 0.5, "effective_senders": 2.0, "val_ndcg_at_10": 0.1 * number},
            }
            for number in range(rounds)
            for client in range(count)
        ]
        pd.DataFrame(rows).to_csv(folder / "rounds.csv", index=False)
    return folder


def write_pair(folder: Path, num_clients: int, seeds: Sequence[int] = (0, 1)) -> Path:
    """FedAvg and FELLRec on eight users a client, in the folders of a comparison."""
    draw = np.random.default_rng(0)
    clients = np.arange(num_clients).repeat(8).tolist()
    for seed in seeds:
        for rule in ("FedAvg", "FELLRec"):
            write_run(folder / f"{rule}-{seed}", rule, seed, draw.uniform(size=len(clients)).tolist(), clients)
    return folder
