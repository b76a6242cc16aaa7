"""Sends outboxes to the tracking server. Every operation may be sent twice: that changes nothing there.

MLflow takes seconds to import, so it is imported where it is needed.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fellrec.errors import FellrecError
from fellrec.tracking.outbox import Operation, Sent, first_operation, operations, read_sent, sending, write_sent
from fellrec.tracking.store import connect, ensure_experiment

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

UID_TAG = "fellrec.run_uid"
"""Names a run before the server has given it an id, so that a run that was made already is found again."""
PARENT_TAG = "mlflow.parentRunId"
_MOST_METRICS, _MOST_PARAMS = 1000, 100
"""Most that MLflow takes in one batch."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 1.0, 30.0

_log = logging.getLogger(__name__)


class OutboxError(FellrecError):
    """The tracking server does not answer, or refuses an operation; the outbox keeps it and all that follow."""


class EarlyError(OutboxError):
    """The comparison that a run belongs to is still on its way to the server: no reason to warn anybody."""


class OutboxClient:
    """Sends one outbox.

    Args:
        folder: The outbox.
        uri: Where to; ``None`` for the store that the run was started with.
    """

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        self.folder = folder
        self.uri = uri or str(_first(folder).fields["uri"])
        self._client: MlflowClient | None = None

    def send(self) -> int:
        """Send what is left, in order.

        Returns:
            Operations sent.

        Raises:
            OutboxError: When the server does not take one of them.
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
                _SENDERS[operation.kind](client, sent.run_id, self.folder.parent, operation)
        except OutboxError:
            raise
        except Exception as error:  # MLflow, SQLAlchemy and requests each raise their own
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            what = f"{self.uri} did not take operation {operation.number} ({operation.kind})"
            raise OutboxError(f"{what}: {first_line}") from error
        return replace(sent, number=operation.number + 1, end=operation.end)


class Sender:
    """Sends an outbox in a thread while the run goes on, so that no round waits for the server.

    When the server does not answer, it tries again after a second, then after twice that, up to half a minute.

    Args:
        delivery: Of the outbox.
    """

    def __init__(self, delivery: OutboxClient) -> None:
        self.error: OutboxError | None = None
        self._delivery = delivery
        self._wake, self._closing = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something to send; a server that did not answer is left alone until its pause is over."""
        if self.error is None:
            self._wake.set()

    def finish(self, limit_seconds: float | None = None) -> None:
        """Wait until everything is sent, or the server has failed once more.

        Args:
            limit_seconds: Longest wait.
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
            has_failed, was_away = self.error is not None, self._is_away
            try:
                self._delivery.send()
                self.error, pause = None, _FIRST_PAUSE_SECONDS
            except (FellrecError, OSError) as error:
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS) if has_failed else _FIRST_PAUSE_SECONDS
                self.error = error if isinstance(error, OutboxError) else OutboxError(str(error))
            if was_away != self._is_away and not is_last:
                self._tell()

    @property
    def _is_away(self) -> bool:
        return self.error is not None and not isinstance(self.error, EarlyError)

    def _tell(self) -> None:
        if self.error is None:
            _log.warning("%s answers again; all that was kept is sent", self._delivery.uri)
        else:
            _log.warning("%s; the run goes on, and what it logs is kept in %s", self.error, self._delivery.folder)


def _first(folder: Path) -> Operation:
    first = first_operation(folder)
    if first is None:
        raise FellrecError(f"{folder} holds no complete operation: the run stopped before it logged anything")
    return first


def _create(client: MlflowClient, uri: str, operation: Operation) -> str:
    """Make the run, unless it was made before its acknowledgement was lost."""
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
            raise EarlyError(f"{uri} does not hold the comparison that the run belongs to yet; send that first")
        tags[PARENT_TAG] = parent
    run = client.create_run(experiment_id, start_time=operation.time, tags=tags, run_name=fields["run_name"])
    return str(run.info.run_id)


def _find(client: MlflowClient, experiment_id: str, uid: str) -> str | None:
    found = client.search_runs([experiment_id], f"tags.`{UID_TAG}` = '{uid}'", order_by=["attributes.start_time ASC"])
    return str(found[0].info.run_id) if found else None


def _send_params(client: MlflowClient, run_id: str, run_dir: Path, operation: Operation) -> None:
    from mlflow.entities import Param

    for chunk in _chunks(operation.fields["params"], _MOST_PARAMS):
        client.log_batch(run_id, params=[Param(key, value) for key, value in chunk])


def _send_metrics(client: MlflowClient, run_id: str, run_dir: Path, operation: Operation) -> None:
    from mlflow.entities import Metric

    step = operation.fields["step"]
    for chunk in _chunks(operation.fields["metrics"], _MOST_METRICS):
        client.log_batch(run_id, metrics=[Metric(key, value, operation.time, step) for key, value in chunk])


def _send_tag(client: MlflowClient, run_id: str, run_dir: Path, operation: Operation) -> None:
    client.set_tag(run_id, operation.fields["key"], operation.fields["value"])


def _send_dataset(client: MlflowClient, run_id: str, run_dir: Path, operation: Operation) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    fields = operation.fields
    entity = Dataset(
        name=fields["name"],
        digest=fields["digest"],
        source_type="local",
        source=json.dumps({"uri": fields["source"]}),
        profile=json.dumps(fields["statistics"]),
    )
    client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])


def _send_artifact(client: MlflowClient, run_id: str, run_dir: Path, operation: Operation) -> None:
    path = run_dir / operation.fields["path"]
    if path.is_dir():
        client.log_artifacts(run_id, str(path), operation.fields["folder"])
    elif path.is_file():
        client.log_artifact(run_id, str(path), operation.fields["folder"])
    else:
        _log.warning("%s is gone and cannot be sent", path)


def _send_reopen(client: MlflowClient, run_id: str, run_dir: Path, operation: Operation) -> None:
    client.update_run(run_id, status="RUNNING")
    if "error" in client.get_run(run_id).data.tags:
        client.delete_tag(run_id, "error")


def _send_terminate(client: MlflowClient, run_id: str, run_dir: Path, operation: Operation) -> None:
    client.set_terminated(run_id, operation.fields["status"], end_time=operation.time)


_SENDERS: dict[str, Callable[[MlflowClient, str, Path, Operation], None]] = {
    "params": _send_params,
    "metrics": _send_metrics,
    "tag": _send_tag,
    "dataset": _send_dataset,
    "artifact": _send_artifact,
    "reopen": _send_reopen,
    "terminate": _send_terminate,
}


def _chunks(items: Mapping[str, Any], size: int) -> Iterator[list[tuple[str, Any]]]:
    pairs = list(items.items())
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]
