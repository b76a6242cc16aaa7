"""Logs the models of all clients as one MLflow model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import FitResult
from fellrec.functional.ranges import Natural
from fellrec.tracking.run_log import RunLog

FOLDER = "model"
_log = logging.getLogger(__name__)


class LoggedModel(FederatedCallback):
    """Writes ``model/``, an MLflow model with every client's adapter, and logs it when the run is over.

    Args:
        log: Of the run.
        run_dir: The run's directory.
        write_model: Writes it into a new folder; says why if it cannot be.
        is_tracked: Whether there is a store.
        register: Name of a registered model of which it becomes a version; ``None`` to not register it.
        max_logged_clients: In a larger population no model is written.
    """

    def __init__(
        self,
        log: RunLog,
        run_dir: Path,
        write_model: Callable[[FitResult, Path], str | None],
        is_tracked: bool = True,
        register: str | None = None,
        max_logged_clients: Natural = 100,
    ) -> None:
        self.log = log
        self.folder = run_dir / FOLDER
        self.is_tracked = is_tracked
        self.register = register
        self.max_logged_clients = max_logged_clients
        self._write = write_model

    def on_fit_end(self, result: FitResult) -> None:
        """Write and log the model, unless a run that was resumed has done so."""
        if not self.is_tracked or len(result.served) > self.max_logged_clients:
            return
        if not self.folder.exists() and (why := self._write(result, self.folder)) is not None:
            _log.info("no MLflow model is logged: %s", why)
            return
        self.log.log_model(self.folder, self.register)
