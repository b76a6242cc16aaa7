"""Links to pages of the MLflow UI that open on what a run has logged."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import quote

UI_PORT = 5000
UI_ADDRESS = f"http://127.0.0.1:{UI_PORT}"
"""Where ``fellrec ui`` is, unless told otherwise."""
_TRAINING = "workflowType=machine_learning"
"""Without it MLflow opens the page of traces of language models, which has nothing of a run."""


def compare_path(experiment_id: str, run_ids: Sequence[str]) -> str:
    """Runs side by side, as a link within the UI, whatever its address.

    Example:
        >>> compare_path("1", ["a", "b"])
        '#/compare-runs?runs=[%22a%22,%22b%22]&experiments=[%221%22]&workflowType=machine_learning'
    """
    return f"#/compare-runs?{_runs(experiment_id, run_ids)}&{_TRAINING}"


def metric_path(experiment_id: str, run_ids: Sequence[str], metric: str) -> str:
    """One metric of several runs by step, as a link within the UI.

    Example:
        >>> metric_path("1", ["a"], "train/loss").partition("&experiments=")[0]
        '#/metric?runs=[%22a%22]'
    """
    name = f"%22{quote(metric, safe='')}%22"
    plot = f"metric={name}&plot_metric_keys=[{name}]&plot_layout={{}}"
    return f"#/metric?{_runs(experiment_id, run_ids)}&{plot}&{_TRAINING}"


def _runs(experiment_id: str, run_ids: Sequence[str]) -> str:
    return f"runs=[{','.join(f'%22{run_id}%22' for run_id in run_ids)}]&experiments=[%22{experiment_id}%22]"


def runs_page(address: str, experiment_id: str | None) -> str:
    """All runs of an experiment as a table and as charts; the list of experiments without one.

    Example:
        >>> runs_page("http://127.0.0.1:5000/", "1")
        'http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning'
    """
    place = "" if experiment_id is None else f"/{experiment_id}/runs"
    return f"{address.rstrip('/')}/#/experiments{place}?{_TRAINING}"


def run_page(address: str, experiment_id: str, run_id: str) -> str:
    """One run: its note, parameters, metrics and files.

    Example:
        >>> run_page("http://127.0.0.1:5000", "1", "ab12")
        'http://127.0.0.1:5000/#/experiments/1/runs/ab12?workflowType=machine_learning'
    """
    return f"{address.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?{_TRAINING}"
