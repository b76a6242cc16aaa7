"""Sends outboxes to the MLflow server. Operations are idempotent: sending one twice has no effect.

Importing MLflow takes seconds, so functions import it when they need it.
"""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fellrec.errors import FellrecError
from fellrec.tracking.outbox import Operation, Sent, first_operation, operations, read_sent, sending, write_sent
from fellrec.tracking.store import connect, ensure_experiment

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

UID_TAG = "fellrec.run_uid"
"""Tag that identifies a run before the server assigns an id; it prevents creating the same run twice."""
PARENT_TAG = "mlflow.parentRunId"
_FIRST_PAUSE_SECONDS, _MAX_PAUSE_SECONDS = 1.0, 30.0

_log = logging.getLogger(__name__)


class OutboxError(FellrecError):
    """The MLflow server is unreachable or rejects an operation; it and all later operations stay in the outbox."""


class ParentNotFoundError(OutboxError):
    """The parent run of a comparison is not on the server yet; this is expected and not worth a warning."""


class OutboxClient:
    """Sends one outbox.

    Args:
        folder: The outbox.
        uri: MLflow tracking URI; ``None`` for the one that the run was started with.
    """

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        self.folder = folder
        self.uri = uri or str(first_operation(folder).fields["uri"])
        self._client: MlflowClient | None = None

    def send(self) -> int:
        """Send the remaining operations in order.

        Returns:
            Number of operations sent.

        Raises:
            OutboxError: If an operation fails.
        """
        number = 0
        with sending(self.folder):
            sent = read_sent(self.folder)
            for operation in operations(self.folder, sent):
                sent = self._send(operation, sent)
                write_sent(self.folder, sent)
                number += 1
        return number

    def _send(self, operation: Operation, sent: Sent) -> Sent:
        try:
            client = self._client = self._client or connect(self.uri)
            if operation.kind == "create":
                sent = replace(sent, run_id=_create(client, self.uri, operation))
            else:
                assert sent.run_id is not None
                _deliver(client, sent.run_id, self.folder.parent, operation)
        except OutboxError:
            raise
        except Exception as error:  # MLflow, SQLAlchemy and requests raise different types
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            failed = f"{self.uri}: operation {operation.number} ({operation.kind}) failed"
            raise OutboxError(f"{failed}: {first_line}") from error
        return replace(sent, number=operation.number + 1, end=operation.end)


class Sender:
    """Sends an outbox in a background thread, so that no round waits for the server.

    After a failure it retries after 1, 2, 4, … seconds, at most 30.

    Args:
        client: Client of the outbox.

    Attributes:
        error: The last error; ``None`` after a success.
    """

    def __init__(self, client: OutboxClient) -> None:
        self.error: OutboxError | None = None
        self._client = client
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Send new operations; after a failure this waits for the next retry."""
        if self.error is None:
            self._wake.set()

    def finish(self, limit_seconds: float | None = None) -> None:
        """Try to send the remaining operations once more, then end the thread.

        Args:
            limit_seconds: Maximum wait; ``None`` for no limit.
        """
        self._closing.set()
        self._wake.set()
        self._thread.join(limit_seconds)

    def _run(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        is_last = False
        while not is_last:
            self._wake.wait(None if self.error is None else pause)
            self._wake.clear()
            is_last = self._closing.is_set()
            has_failed, was_unreachable = self.error is not None, self._is_unreachable
            try:
                self._client.send()
                self.error, pause = None, _FIRST_PAUSE_SECONDS
            except (FellrecError, OSError) as error:
                pause = min(2 * pause, _MAX_PAUSE_SECONDS) if has_failed else _FIRST_PAUSE_SECONDS
                self.error = error if isinstance(error, OutboxError) else OutboxError(str(error))
            if was_unreachable != self._is_unreachable and not is_last:
                self._warn()

    @property
    def _is_unreachable(self) -> bool:
        return self.error is not None and not isinstance(self.error, ParentNotFoundError)

    def _warn(self) -> None:
        if self.error is None:
            _log.warning("%s is reachable again; all recorded operations were sent", self._client.uri)
        else:
            _log.warning("%s; the run continues, and its metrics are recorded in %s", self.error, self._client.folder)


def _create(client: MlflowClient, uri: str, operation: Operation) -> str:
    """Create the run, unless an earlier attempt created it and its response was lost."""
    fields = operation.fields
    experiment_id = ensure_experiment(client, uri, fields["experiment"])
    uid, parent_uid = fields["uid"], fields["parent_uid"]
    found = _find(client, experiment_id, uid)
    if found is not None:
        return found
    tags = {**fields["tags"], UID_TAG: uid}
    if parent_uid is not None:
        parent = _find(client, experiment_id, parent_uid)
        if parent is None:
            raise ParentNotFoundError(f"{uri} does not have the run's comparison yet; send the comparison first")
        tags[PARENT_TAG] = parent
    run = client.create_run(experiment_id, start_time=operation.time, tags=tags, run_name=fields["run_name"])
    return str(run.info.run_id)


def _find(client: MlflowClient, experiment_id: str, uid: str) -> str | None:
    found = client.search_runs([experiment_id], f"tags.`{UID_TAG}` = '{uid}'", order_by=["attributes.start_time ASC"])
    return str(found[0].info.run_id) if found else None


def _deliver(client: MlflowClient, run_id: str, run_dir: Path, operation: Operation) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    fields = operation.fields
    match operation.kind:
        case "params":
            client.log_batch(run_id, params=[Param(key, value) for key, value in fields["params"].items()])
        case "metrics":
            values, step = fields["metrics"].items(), fields["step"]
            client.log_batch(run_id, metrics=[Metric(key, value, operation.time, step) for key, value in values])
        case "tag":
            client.set_tag(run_id, fields["key"], fields["value"])
        case "dataset":
            source, profile = json.dumps({"uri": fields["source"]}), json.dumps(fields["statistics"])
            dataset = Dataset(fields["name"], fields["digest"], "local", source, profile=profile)
            client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])
        case "artifact":
            _upload(client, run_id, run_dir / fields["path"], fields["folder"])
        case "reopen":
            client.update_run(run_id, status="RUNNING")
            if "error" in client.get_run(run_id).data.tags:
                client.delete_tag(run_id, "error")
        case "terminate":
            client.set_terminated(run_id, fields["status"], end_time=operation.time)
        case unexpected:
            raise ValueError(f"unexpected operation {unexpected}")


def _upload(client: MlflowClient, run_id: str, path: Path, folder: str | None) -> None:
    if path.is_dir():
        client.log_artifacts(run_id, str(path), folder)
    elif path.is_file():
        client.log_artifact(run_id, str(path), folder)
    else:
        _log.warning("%s was deleted and is not uploaded", path)
