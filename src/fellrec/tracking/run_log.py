"""What a run tells MLflow: written to the run's outbox at once, sent while the run goes on, or later."""

from __future__ import annotations

import json
import re
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fellrec.errors import ConfigError
from fellrec.tracking.delivery import OutboxClient, Sender
from fellrec.tracking.outbox import Outbox, first_operation, num_left, read_sent
from fellrec.tracking.store import absolute

_LONGEST_PARAM, _LONGEST_TAG = 250, 500
_SECONDS_AFTER_FAILURE = 30.0
"""Longest wait for a server that answers when a run was stopped: whoever stopped it may not wait longer."""


@dataclass(frozen=True)
class NewRun:
    """How a run is made on the server.

    Attributes:
        uri: MLflow tracking URI.
        experiment: Made if absent.
        name: Shown in the UI.
        tags: Beside those that say who ran what.
        parent_uid: `RunLog.uid` of the run that it belongs to.
    """

    uri: str
    experiment: str
    name: str
    tags: Mapping[str, str]
    parent_uid: str | None = None


class RunLog:
    """One MLflow run, or what is to become one when the server answers.

    Only the process that leads the run makes one. A run directory with an outbox goes on with it: the same run on the
    server, and nothing that it has already is logged again.

    Args:
        run_dir: Everything that is uploaded lies in it.
        new: How the run is made, if the directory has no outbox yet.
    """

    def __init__(self, run_dir: Path, new: NewRun) -> None:
        self.run_dir = run_dir
        self._outbox = Outbox(outbox_dir(run_dir))
        if self._outbox.is_empty:
            self._outbox.append("create", **_creation(new))
        else:
            self._outbox.append("reopen")
        first = first_operation(self._outbox.folder)
        assert first is not None
        self._fields = first.fields
        self._sender = Sender(OutboxClient(self._outbox.folder))
        self._sender.wake()

    @property
    def uid(self) -> str:
        """The run's name before the server has given it an id."""
        return str(self._fields["uid"])

    @property
    def run_id(self) -> str | None:
        """The run's id on the server; ``None`` until it was made there."""
        return read_sent(self._outbox.folder).run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log the settings, once in the run's life."""
        values = {key: str(value)[:_LONGEST_PARAM] for key, value in params.items()}
        self._append("params", once="params", params=values)

    def log_metrics(self, metrics: Mapping[str, float], step: int, once: str) -> None:
        """Log a step's metrics.

        Args:
            metrics: Name → value; what MLflow does not allow in a name is left out.
            step: The round.
            once: Name of this part of the step: a resumed run that comes to it again does not log it again.
        """
        values = {re.sub(r"[^\w/. -]", "", key, flags=re.ASCII): float(value) for key, value in metrics.items()}
        self._append("metrics", once=f"{once} {step}", step=step, metrics=values)

    def log_dataset(self, name: str, digest: str, source: str, statistics: Mapping[str, Any]) -> None:
        """Log what the run is trained on, once in its life."""
        plain = json.loads(json.dumps(dict(statistics), default=str))
        self._append("dataset", once="dataset", name=name, digest=digest, source=source, statistics=plain)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file or what is in a folder of the run directory, if it exists; it must not change any more.

        Args:
            path: Below the run directory.
            folder: Of the run's artefacts.
        """
        if path.exists():
            self._append("artifact", path=str(path.relative_to(self.run_dir)), folder=folder)

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self._append("tag", key=key, value=value[:_LONGEST_TAG])

    def close(self, status: str = "FINISHED") -> None:
        """End the run, and say how to send what the server did not take.

        A comparison that is finished sends what its runs have left, too: one may have ended before the server knew the
        comparison, or while it was away.

        Args:
            status: ``"FINISHED"``, ``"FAILED"`` or ``"KILLED"``.
        """
        try:
            self._append("terminate", status=status)
        finally:
            self._sender.finish(None if status == "FINISHED" else _SECONDS_AFTER_FAILURE)
            self._outbox.close()
        if status == "FINISHED" and self._sender.error is None:
            for folder in filter(num_left, outboxes(self.run_dir)[1:]):
                Sender(OutboxClient(folder)).finish()
        left = sum(map(num_left, outboxes(self.run_dir)))
        if left and self._fields["parent_uid"] is None:  # a comparison speaks for its runs
            why = f"{self._sender.error}\n" if self._sender.error else ""
            sys.stderr.write(
                f"\n{why}{left} operations for MLflow are kept in {self.run_dir}; "
                f"send them by: fellrec sync {self.run_dir}\n"
            )

    def _append(self, kind: str, once: str | None = None, **fields: Any) -> None:
        if self._outbox.append(kind, once, **fields):
            self._sender.wake()


@contextmanager
def parent_run(run_dir: Path, new: NewRun) -> Iterator[RunLog]:
    """The run that groups a comparison; it is closed as finished, failed or killed."""
    log = RunLog(run_dir, new)
    try:
        yield log
    except BaseException as error:
        log.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    log.close()


def outbox_dir(run_dir: Path) -> Path:
    """Where a run keeps what it tells MLflow."""
    return run_dir / "outbox"


def outboxes(run_dir: Path) -> list[Path]:
    """The run's outbox, and after it those of the runs that a comparison keeps below itself.

    Raises:
        ConfigError: If the directory is no run's.
    """
    own = outbox_dir(run_dir)
    if not own.is_dir():
        raise ConfigError(f"{run_dir} has no outbox; give the directory of a run")
    return [own, *sorted(run_dir.glob("*/outbox"))]


def _creation(new: NewRun) -> dict[str, Any]:
    from mlflow.tracking.context.registry import resolve_tags

    return {
        "uri": absolute(new.uri),
        "experiment": new.experiment,
        "uid": uuid.uuid4().hex,
        "run_name": new.name,
        "tags": resolve_tags(dict(new.tags)),
        "parent_uid": new.parent_uid,
    }
