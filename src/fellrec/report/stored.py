"""The result of a finished run from the files of its directory: a resumed comparison does not test it again."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from fellrec.data.prepared import PreparedData
from fellrec.errors import ConfigError
from fellrec.report.comparison import RuleResult
from fellrec.report.costs import RunCost
from fellrec.report.folders import FINISHED, RESULTS, USERS
from fellrec.report.runs import evaluation_of
from fellrec.state.files import write_json
from fellrec.tracking.run_log import id_of_run

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
            evaluation=evaluation_of(found, users, data.users["user_id"]),
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
