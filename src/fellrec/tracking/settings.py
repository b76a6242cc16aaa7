"""Settings of MLflow: ``tracking``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fellrec.functional.ranges import Allowed, Natural, check

DEFAULT_URI = "sqlite:///mlflow.db"
_MAX_NAME_LENGTH = 500
"""MLflow's limit of an experiment's name."""


def _is_address(value: Any) -> bool:
    """Whether MLflow may have a store of this address; what only it can know is checked before a run starts."""
    return isinstance(value, str) and (value in ("databricks", "uc") or "://" in value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value.strip()) <= len(value) <= _MAX_NAME_LENGTH


Address = Annotated[str, Allowed(_is_address, f"an address such as {DEFAULT_URI} or http://HOST:5000")]
Name = Annotated[
    str, Allowed(_is_name, f"one line of 1 to {_MAX_NAME_LENGTH} characters; a number is quoted twice: '\"2026\"'")
]


@dataclass(frozen=True)
class TrackingSettings:
    """Where a run is tracked.

    A run writes all metrics, parameters and artefacts into its own directory first (``RUN_DIR/outbox``) and sends them
    while it trains. If the server becomes unreachable, the run does not wait: what is not sent yet is sent when the
    server answers again, at the end of the run, when the run is resumed, or by ``fellrec sync RUN_DIR``.
    """

    uri: Address | None = DEFAULT_URI
    """Any MLflow tracking URI; unset: that of MLFLOW_TRACKING_URI. null: the run is not tracked. A password in it is
    used and written nowhere."""
    experiment: Name = "fellrec"
    """Name of the MLflow experiment; unset: that of MLFLOW_EXPERIMENT_NAME."""
    on_unreachable: Literal["stop", "keep"] = "stop"
    """If a store does not answer when a run starts: stop reports it and trains nothing, keep starts and sends later.
    A resumed run always starts."""
    metrics: Literal["headline", "all"] = "headline"
    """Which metrics MLflow gets: headline, about 30 and three a client, without copies and constants; or all. Every
    metric, cutoff and statistic is in the tables ``evaluations.csv`` and ``clients.csv`` in any case."""
    register_model: Name | None = None
    """Name of a registered model of which the run's model becomes a version; null: it is logged, not registered."""
    max_logged_clients: Natural = 100
    """With more clients MLflow gets figures over all of them only; the run directory has each client's."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "tracking")
