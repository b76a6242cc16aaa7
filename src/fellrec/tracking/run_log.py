"""The MLflow run of a run: operations are written to the outbox first and sent in the background."""

from __future__ import annotations

import json
import logging
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fellrec.errors import ConfigError
from fellrec.functional.secrets import hide, redact
from fellrec.state.run_folder import which_run
from fellrec.tracking.delivery import OutboxClient, Sender
from fellrec.tracking.headline import logged_name
from fellrec.tracking.outbox import Outbox, first_operation, num_left, operations, read_sent
from fellrec.tracking.store import absolute

_OUTBOX = "outbox"
"""Directory of the outbox in a run directory."""
_MAX_KEY_LENGTH, _MAX_PARAM_LENGTH, _MAX_TAG_LENGTH = 250, 6000, 8000
_MAX_DATASET_LENGTHS = {"name": 500, "digest": 36, "source": 10_000}
"""MLflow's limits. It refuses what is longer, and so would never get what comes after it."""
_SECONDS_AFTER_FAILURE = 30.0
"""Maximum wait for the server after a run failed or was stopped."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewRun:
    """What is needed to create a run on the server.

    Attributes:
        uri: MLflow tracking URI; ``None`` if the run is not tracked.
        experiment: Name of the experiment; created if absent.
        name: Name of the run in the UI.
        tags: Tags in addition to MLflow's own, such as user and source.
        parent_uid: `RunLog.uid` of the parent run.
    """

    uri: str | None
    experiment: str
    name: str
    tags: Mapping[str, str]
    parent_uid: str | None = None


class RunLog:
    """One MLflow run.

    Only the coordinating process creates one. If the run directory has an outbox, the same MLflow run is continued, and
    nothing is logged twice.

    Args:
        run_dir: The run directory; it contains all uploaded files.
        new: Used to create the run if the directory has no outbox.
        is_shown: Whether a metric of this name is logged.
    """

    def __init__(self, run_dir: Path, new: NewRun, is_shown: Callable[[str], bool] = lambda name: True) -> None:
        self.run_dir = run_dir
        self._is_shown = is_shown
        self._outbox = Outbox(run_dir / _OUTBOX)
        if self._outbox.is_empty:
            self._outbox.append("create", **_creation(new))
        else:
            self._outbox.append("reopen")
        self._fields = first_operation(self._outbox.folder).fields
        self._uri = _address(new)
        self._sender = Sender(OutboxClient(self._outbox.folder, self._uri))
        self._sender.wake()

    @property
    def uid(self) -> str:
        """Identifies the run before the server assigns an id."""
        return str(self._fields["uid"])

    @property
    def run_id(self) -> str | None:
        """The run's id on the server; ``None`` until it is created there."""
        return read_sent(self._outbox.folder).run_id

    @property
    def place(self) -> tuple[str, str] | None:
        """The ids of the experiment and of the run on the server; ``None`` until it is created there."""
        return place_of(self.run_dir)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log the settings, once per run."""
        values = {_key(key): _text(key, value, _MAX_PARAM_LENGTH) for key, value in params.items()}
        self._append("params", once="params", params=values)

    def log_metrics(self, metrics: Mapping[str, float], step: int, once: str) -> None:
        """Log metrics of a step.

        Args:
            metrics: Name → value; what MLflow does not allow is removed from names. See ``tracking.metrics`` and
                `logged_name`.
            step: The round; 0 for what a run has once, which MLflow then draws as bars beside those of other runs.
            once: Key of these metrics within the step; a resumed run that repeats the step does not log them again.
        """
        values = {_key(logged_name(key)): float(value) for key, value in metrics.items() if self._is_shown(key)}
        if values:
            self._append("metrics", once=f"{once} {step}", step=step, metrics=values)

    def log_dataset(self, name: str, digest: str, source: str, statistics: Mapping[str, Any]) -> None:
        """Log the data set, once per run."""
        plain = json.loads(json.dumps(dict(statistics), default=str))
        given = {"name": name, "digest": digest, "source": source}
        texts = {key: _text(f"the data set's {key}", given[key], limit) for key, limit in _MAX_DATASET_LENGTHS.items()}
        self._append("dataset", once="dataset", **texts, statistics=plain)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Upload a file, or the content of a directory, if it exists; it must not change afterwards.

        Args:
            path: Path inside the run directory.
            folder: Destination among the run's artefacts.
        """
        if path.exists():
            self._append("artifact", path=str(path.relative_to(self.run_dir)), folder=folder)

    def log_model(self, folder: Path, register: str | None = None) -> None:
        """Log an MLflow model, once per run; it must not change afterwards.

        Args:
            folder: Inside the run directory; has the file ``MLmodel``.
            register: Name of a registered model of which it becomes a version.
        """
        self._append("model", once="model", path=str(folder.relative_to(self.run_dir)), register=register)

    def set_tag(self, key: str, value: str) -> None:
        """Set a tag."""
        self._append("tag", key=key, value=_text(key, value, _MAX_TAG_LENGTH))

    def close(self, status: str = "FINISHED") -> None:
        """End the run, and print how to send operations that remain.

        A finished comparison also sends the remaining operations of its runs: a run can end before the comparison is
        on the server, or while the server is unreachable.

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
                Sender(OutboxClient(folder, self._uri)).finish()
        left = sum(map(num_left, outboxes(self.run_dir)))
        if left and self._fields["parent_uid"] is None:  # a comparison reports for its runs
            reason = f"{self._sender.error}\n" if self._sender.error else ""
            sys.stderr.write(
                f"\n{reason}{left} MLflow operations were not sent; send them with: fellrec sync {self.run_dir}\n"
            )

    def _append(self, kind: str, once: str | None = None, **fields: Any) -> None:
        if self._outbox.append(kind, once, **fields):
            self._sender.wake()


class Untracked(RunLog):
    """Stands for the MLflow run of a run that is not tracked: nothing is recorded or sent.

    Args:
        run_dir: The run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self._is_shown = lambda name: True

    @property
    def uid(self) -> str:
        """Empty."""
        return ""

    @property
    def run_id(self) -> None:
        """``None``."""
        return None

    @property
    def place(self) -> None:
        """``None``."""
        return None

    def close(self, status: str = "FINISHED") -> None:
        """Nothing is open."""

    def _append(self, kind: str, once: str | None = None, **fields: Any) -> None:
        pass


def open_log(run_dir: Path, new: NewRun, is_shown: Callable[[str], bool] = lambda name: True) -> RunLog:
    """The MLflow run of a run.

    Args:
        run_dir: The run directory.
        new: See `RunLog`; without a store the run is not tracked.
        is_shown: See `RunLog`.
    """
    return Untracked(run_dir) if new.uri is None else RunLog(run_dir, new, is_shown)


@contextmanager
def parent_run(run_dir: Path, new: NewRun) -> Iterator[RunLog]:
    """The parent run of a comparison; it is closed as finished, failed or killed."""
    log = open_log(run_dir, new)
    try:
        yield log
    except BaseException as error:
        log.close("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    log.close()


def outboxes(run_dir: Path) -> list[Path]:
    """The outbox of a run; of a comparison, its own outbox and then those of its runs.

    Raises:
        ConfigError: If it is not the directory of a run.
    """
    own = run_dir / _OUTBOX
    if not own.is_dir() or own.is_symlink():
        raise ConfigError(f"{run_dir} has no outbox; {which_run(run_dir)}")
    others = [folder for folder in sorted(run_dir.glob(f"*/{_OUTBOX}")) if not folder.parent.is_symlink()]
    return [own, *others]


def place_of(run_dir: Path) -> tuple[str, str] | None:
    """The ids of the experiment and of the run in the store; ``None`` if it has not been sent there."""
    folder = run_dir / _OUTBOX
    sent = read_sent(folder) if folder.is_dir() else None
    if sent is None or sent.run_id is None or sent.experiment_id is None:
        return None
    return sent.experiment_id, sent.run_id


def is_logged(run_dir: Path) -> bool:
    """Whether the outbox of a run has an operation: the run is, or will be, in a store."""
    return any(True for _ in operations(run_dir / _OUTBOX))


def store_of_run(run_dir: Path, named: str) -> str:
    """The store of a run without a password: that of its outbox, or the one of its settings if it logged nothing.

    Args:
        run_dir: The run directory.
        named: ``tracking.uri`` of its settings.
    """
    first = first_operation(run_dir / _OUTBOX) if is_logged(run_dir) else None
    return hide(absolute(named) if first is None else str(first.fields["uri"]))


def id_of_run(run_dir: Path) -> str | None:
    """The id on the server of the run in a directory; ``None`` if it is not there, or not tracked.

    Raises:
        TrainingError: If the record is damaged.
    """
    return read_sent(run_dir / _OUTBOX).run_id


def _key(name: str) -> str:
    """A name as MLflow takes it: ASCII, a path without empty parts or dots."""
    parts = re.sub(r"[^\w/. -]", "", name, flags=re.ASCII)[:_MAX_KEY_LENGTH].split("/")
    return "/".join(part for part in parts if part.strip(".")) or "unnamed"


def _text(name: str, value: Any, limit: int) -> str:
    """A value as MLflow takes it, without secrets."""
    text = redact(str(value)).encode(errors="replace").decode()
    if len(text) > limit:
        _log.warning("MLflow gets the first %d of the %d characters of %s", limit, len(text), name)
    return text[:limit]


def _address(new: NewRun) -> str:
    assert new.uri is not None
    return hide(absolute(new.uri))


def _creation(new: NewRun) -> dict[str, Any]:
    from mlflow.tracking.context.registry import resolve_tags

    tags = resolve_tags(dict(new.tags))  # the address of a git repository among them may have a password
    return {
        "uri": _address(new),
        "experiment": new.experiment,
        "uid": uuid.uuid4().hex,
        "run_name": new.name,
        "tags": {key: _text(key, value, _MAX_TAG_LENGTH) for key, value in tags.items()},
        "parent_uid": new.parent_uid,
    }
