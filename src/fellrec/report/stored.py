"""The result of a finished run from the files of its directory: a resumed comparison does not test it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fellrec.data.prepared import PreparedData
from fellrec.errors import ConfigError
from fellrec.report.comparison import RuleResult
from fellrec.report.costs import RunCost
from fellrec.state.files import write_json
from fellrec.tracking.run_log import id_of_run
from fellrec.types import Evaluation

FINISHED = "finished.json"
"""Written when everything else of a run is: what the table of a comparison says of it beside its metrics."""
RESULTS, USERS = "results.json", "users.parquet"
_FIGURES = (
    *("seconds_per_round", "cpu_seconds_per_round", "total_seconds", "peak_memory_bytes"),
    *("best_round", "validation"),
)


def write_finished(run_dir: Path, result: RuleResult) -> None:
    """Mark a run as finished.

    Raises:
        StorageError: If the file cannot be written.
    """
    write_json(run_dir / FINISHED, {name: getattr(result, name) for name in _FIGURES})


def is_finished(run_dir: Path) -> bool:
    """Whether a run has ended and its results are all there; without ``callbacks.outputs`` they never are."""
    return all((run_dir / name).is_file() for name in (FINISHED, RESULTS, USERS))


def read_result(run_dir: Path, data: PreparedData, rule: str, variant: str) -> RuleResult:
    """The result of a finished run.

    Args:
        run_dir: Of the run.
        data: The data that it was trained with.
        rule: Its name in the comparison.
        variant: See ``RuleResult``.

    Raises:
        ConfigError: If one of its files is damaged.
    """
    try:
        figures, found = (json.loads((run_dir / name).read_bytes()) for name in (FINISHED, RESULTS))
        users = pd.read_parquet(run_dir / USERS)
        cost = found.get("cost")
        return RuleResult(
            rule=rule,
            seed=int(found["seed"]),
            kind="learned",
            evaluation=_evaluation(found, users, data),
            run_id=id_of_run(run_dir),
            variant=variant,
            cost=None if cost is None else RunCost.of_dict(cost),
            **{name: figures[name] for name in _FIGURES},
        )
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:  # JSON, pandas and pyarrow
        raise ConfigError(
            f"the results in {run_dir} are damaged: {' '.join(str(error).split())}; without {FINISHED} the run is "
            "tested again"
        ) from error


def _evaluation(found: dict[str, Any], users: pd.DataFrame, data: PreparedData) -> Evaluation:
    index = pd.Index(data.users["user_id"]).get_indexer(users["user_id"])
    if (index < 0).any():
        raise ValueError(f"{USERS} has a user who is not in the data")
    return Evaluation(
        stage=str(found["stage"]),
        round_index=int(found["round_index"]),
        per_user={name: torch.from_numpy(users[name].to_numpy(np.float64, copy=True)) for name in found["per_client"]},
        client_of_user=torch.from_numpy(users["client"].to_numpy(np.int64, copy=True)),
        per_client={name: torch.tensor(values, dtype=torch.float64) for name, values in found["per_client"].items()},
        summary={name: float(value) for name, value in found["summary"].items()},
        users=torch.from_numpy(index.astype(np.int64)),
    )
