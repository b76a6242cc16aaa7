"""Settings of MLflow: ``tracking``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fellrec.functional.ranges import Natural, check


@dataclass(frozen=True)
class TrackingSettings:
    """Where a run is tracked.

    A run writes all metrics, parameters and artefacts into its own directory first (``RUN_DIR/outbox``) and sends them
    while it trains. If the server becomes unreachable, the run does not wait: what is not sent yet is sent when the
    server answers again, at the end of the run, when the run is resumed, or by ``fellrec sync RUN_DIR``.
    """

    uri: str = "sqlite:///mlflow.db"
    """Any MLflow tracking URI."""
    experiment: str = "fellrec"
    """Name of the MLflow experiment."""
    on_unreachable: Literal["stop", "keep"] = "stop"
    """If an http(s) server does not answer when a run starts: stop reports it and trains nothing, keep starts and sends
    later. A resumed run always starts."""
    max_logged_clients: Natural = 100
    """With more clients MLflow gets figures over all of them only; the run directory has each client's."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "tracking")
