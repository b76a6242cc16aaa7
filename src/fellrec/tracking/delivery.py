"""Sends outboxes to the MLflow server. Operations are idempotent: sending one twice has no effect.

Importing MLflow takes seconds, so functions import it when they need it.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from fellrec.errors import FellrecError
from fellrec.functional.secrets import hide
from fellrec.state.inside import check_inside
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

    Attributes:
        num_sent: Operations that this client has sent.
    """

    def __init__(self, folder: Path, uri: str | None = None) -> None:
        self.folder = folder
        self._creation = first_operation(folder)
        self.uri = hide(uri or self._creation.fields["uri"])
        self.num_sent = 0
        self._client: MlflowClient | None = None
        self._has_run = False

    def send(self) -> int:
        """Send the remaining operations in order; to a store that does not have the run, all of them.

        Returns:
            Number of operations sent.

        Raises:
            OutboxError: If an operation fails.
        """
        before = self.num_sent
        with sending(self.folder):
            sent = read_sent(self.folder)
            if sent.run_id is not None and not self._has_run:
                sent = self._unless_lost(sent, sent.run_id)
            for operation in operations(self.folder, sent):
                sent = self._send(operation, sent)
                write_sent(self.folder, sent)
                self.num_sent += 1
        return self.num_sent - before

    def _unless_lost(self, sent: Sent, run_id: str) -> Sent:
        """How much of the run this store has; nothing if it has no such run: it is another, or an older copy."""
        with self._reporting(f"run {run_id}"):
            self._has_run = _has_run(self._connected(), run_id, self._creation.fields["uid"])
        if self._has_run:
            return sent
        _log.warning("%s does not have the run of %s: all operations are sent again", self.uri, self.folder.parent)
        return Sent()

    def _send(self, operation: Operation, sent: Sent) -> Sent:
        with self._reporting(f"operation {operation.number} ({operation.kind})"):
            client = self._connected()
            if operation.kind == "create":
                experiment_id = ensure_experiment(client, self.uri, self._creation.fields["experiment"])
                run_id = _create(client, self.uri, self._creation, experiment_id)
                sent = replace(sent, run_id=run_id, experiment_id=experiment_id)
                self._has_run = True
            else:
                assert sent.run_id is not None
                _deliver(client, sent.run_id, self.folder.parent, operation)
        return replace(sent, number=operation.number + 1, end=operation.end)

    def _connected(self) -> MlflowClient:
        self._client = self._client or connect(self.uri)
        return self._client

    @contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        """After a failure, the run is looked for again before the next operation: the store may have lost it."""
        try:
            yield
        except OutboxError:
            raise
        except Exception as error:  # MLflow, SQLAlchemy and requests raise different types
            self._has_run = False
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            raise OutboxError(f"{self.uri}: {what} failed: {first_line}") from error


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


def _create(client: MlflowClient, uri: str, operation: Operation, experiment_id: str) -> str:
    """Create the run, unless an earlier attempt created it and its response was lost."""
    fields = operation.fields
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


def _has_run(client: MlflowClient, run_id: str, uid: str) -> bool:
    """Whether a store has the run, and it was not deleted there."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return run.info.lifecycle_stage == "active" and run.data.tags.get(UID_TAG) == uid


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
            _upload(client, run_id, _inside(run_dir, fields["path"]), fields["folder"])
        case "model":
            _log_model(client, run_id, _inside(run_dir, fields["path"]), fields["register"])
        case "reopen":
            client.update_run(run_id, status="RUNNING")
            if "error" in client.get_run(run_id).data.tags:
                client.delete_tag(run_id, "error")
        case "terminate":
            client.set_terminated(run_id, fields["status"], end_time=operation.time)
        case unexpected:
            raise ValueError(f"unexpected operation {unexpected}")


def _log_model(client: MlflowClient, run_id: str, folder: Path, register: str | None) -> None:
    """Log a model of the run, and register it; what an earlier attempt has done is not done again."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.exceptions import MlflowException

    run = client.get_run(run_id)
    model_id = next(iter(output.model_id for output in run.outputs.model_outputs), None) if run.outputs else None
    if model_id is None:
        tags: dict[str, str] = {key: run.data.tags[key] for key in ("rule", "data", "seed") if key in run.data.tags}
        model = client.create_logged_model(run.info.experiment_id, "clients", run_id, tags, model_type="pyfunc")
        model_id = str(model.model_id)
        client.log_model_artifacts(model_id, str(folder))
        client.finalize_logged_model(model_id, LoggedModelStatus.READY)
        client.log_outputs(run_id, [LoggedModelOutput(model_id, 0)])
    if register is None or client.search_model_versions(f"run_id = '{run_id}'"):
        return
    with suppress(MlflowException):  # it exists
        client.create_registered_model(register)
    source = client.get_logged_model(model_id).artifact_location  # models:/ID is looked for in MLflow's default store
    client.create_model_version(register, source, run_id, model_id=model_id)


def _upload(client: MlflowClient, run_id: str, path: Path, folder: str | None) -> None:
    if folder is not None and not _stays_inside(folder):
        raise OutboxError(
            f"the artefact's folder {folder!r} is not allowed: it must be a path below the run's artefacts"
        )
    if path.is_dir():
        client.log_artifacts(run_id, str(path), folder)
    elif path.is_file():
        client.log_artifact(run_id, str(path), folder)
    else:
        _log.warning("%s was deleted and is not uploaded", path)


def _inside(run_dir: Path, name: str) -> Path:
    """The file or directory of a run that an operation names; a run directory is data, and may name any other file.

    Raises:
        OutboxError: If it is not in the run directory, or is a link.
        ConfigError: If it is a directory that has a link or anything but files and directories.
    """
    path = run_dir / name
    if not _stays_inside(name) or path.resolve() != run_dir.resolve() / name:
        raise OutboxError(f"{name} is not uploaded: only files of the run directory {run_dir} are, and no links")
    if path.is_dir():
        check_inside(path)
    return path


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
