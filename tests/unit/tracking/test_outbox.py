"""The outbox keeps operations in order and without duplicates across crashes of the writer and of the server."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fellrec.errors import ConfigError, TrainingError
from fellrec.tracking.delivery import OutboxClient
from fellrec.tracking.outbox import Outbox, num_left, operations, read_sent, sending, write_sent
from fellrec.tracking.run_log import NewRun, RunLog, outboxes


def kinds(folder: Path) -> list[str]:
    return [operation.kind for operation in operations(folder)]


def filled(folder: Path) -> bytes:
    outbox = Outbox(folder)
    for number in range(4):
        assert outbox.append(f"kind_{number}", once=f"round {number}", value=number / 3)
    outbox.close()
    return (folder / "operations.jsonl").read_bytes()


def test_an_outbox_truncated_at_any_byte_keeps_its_complete_lines_and_accepts_new_ones(tmp_path: Path) -> None:
    whole = filled(tmp_path)
    for length in [0, *range(whole.index(b"kind_2"), len(whole) + 1)]:
        (tmp_path / "operations.jsonl").write_bytes(whole[:length])
        complete = whole[:length].count(b"\n")
        assert len(kinds(tmp_path)) == complete, "a reader skips an incomplete line"
        outbox = Outbox(tmp_path)
        assert [outbox.append("again", once=f"round {number}") for number in range(4)] == [
            number >= complete for number in range(4)
        ]
        outbox.close()
        assert kinds(tmp_path) == [f"kind_{number}" for number in range(complete)] + ["again"] * (4 - complete)
        assert [operation.number for operation in operations(tmp_path)] == [0, 1, 2, 3]


def test_trailing_zeros_are_removed(tmp_path: Path) -> None:
    """Some file systems append zeros to a file that was being written during a power failure."""
    whole = filled(tmp_path)
    (tmp_path / "operations.jsonl").write_bytes(whole + bytes(500))
    assert len(kinds(tmp_path)) == 4
    Outbox(tmp_path).close()
    assert (tmp_path / "operations.jsonl").read_bytes() == whole


def test_damage_before_the_last_line_is_reported_and_the_file_is_unchanged(tmp_path: Path) -> None:
    lines = filled(tmp_path).splitlines(keepends=True)
    damaged = b"".join([lines[0], b"x" + lines[1], *lines[2:]])
    (tmp_path / "operations.jsonl").write_bytes(damaged)
    for _ in range(2):  # the error releases the lock
        with pytest.raises(TrainingError, match=r"operations.jsonl is damaged: operation 1 cannot be read"):
            Outbox(tmp_path)
    assert (tmp_path / "operations.jsonl").read_bytes() == damaged


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    first = Outbox(tmp_path / "outbox")
    with pytest.raises(ConfigError, match=f"{tmp_path} is being written by another process"):
        Outbox(tmp_path / "outbox")
    first.close()
    Outbox(tmp_path / "outbox").close()


@pytest.fixture
def small_files() -> Iterator[None]:
    """Limit files to 300 bytes, to simulate a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_no_incomplete_line(tmp_path: Path, small_files: None) -> None:
    outbox = Outbox(tmp_path)
    outbox.append("fits")
    with pytest.raises(TrainingError, match=r"operations.jsonl cannot be written: .*File too large"):
        outbox.append("too_long", text="x" * 400)
    outbox.append("fits_again")
    assert kinds(tmp_path) == ["fits", "fits_again"]
    assert (tmp_path / "operations.jsonl").read_bytes().endswith(b"}\n")


def test_a_directory_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/outbox cannot be written"):
        Outbox(tmp_path / "file" / "outbox")


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that accepts connections and never responds; yields its address."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_hangs_does_not_block_the_run(
    tmp_path: Path, silent_server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(tmp_path, NewRun(silent_server, "fellrec", "run", {"data": "none"}))
    for step in range(50):
        log.log_metrics({"loss": 1 / (step + 1), "not: allowed": 1}, step, once="round")
    assert read_sent(tmp_path / "outbox").number == 0
    log.close()
    assert num_left(tmp_path / "outbox") == 52
    shown = capsys.readouterr().err
    assert "operation 0 (create) failed" in shown
    assert f"52 MLflow operations were not sent; send them with: fellrec sync {tmp_path}" in shown


def test_a_resumed_run_logs_only_new_operations(empty_store: Path, tmp_path: Path) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    new = NewRun(f"sqlite:///{tmp_path / 'mlflow.db'}", "fellrec", "run", {"data": "none"})
    for rounds in (range(3), range(2, 5)):
        log = RunLog(tmp_path, new)
        log.log_params({"seed": 0, "long": "x" * 999})
        log.log_dataset("name", "digest", "embedded", {"users": 3})
        for step in rounds:
            log.log_metrics({"seconds": rounds.start + step}, step, once="round")
        log.set_tag("error", "stopped")
        log.close("KILLED")
    assert num_left(tmp_path / "outbox") == 0
    assert kinds(tmp_path / "outbox") == [
        *("create", "params", "dataset", "metrics", "metrics", "metrics", "tag", "terminate"),
        *("reopen", "metrics", "metrics", "tag", "terminate"),
    ]
    from mlflow.tracking import MlflowClient

    client, run_id = MlflowClient(new.uri), log.run_id
    assert run_id is not None
    history = client.get_metric_history(run_id, "seconds")
    assert [(point.step, point.value) for point in history] == [(0, 0), (1, 1), (2, 2), (3, 5), (4, 6)]
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["error"]) == ("KILLED", "stopped")
    assert run.info.start_time == next(iter(operations(tmp_path / "outbox"))).time


def test_a_store_without_the_run_is_sent_everything_once(empty_store: Path, tmp_path: Path) -> None:
    """Another store than before, and one that lost the run; ``other.db`` never had its beginning."""
    from mlflow.tracking import MlflowClient

    for name in ("mlflow.db", "other.db"):
        shutil.copy(empty_store, tmp_path / name)
    log = RunLog(tmp_path, NewRun(f"sqlite:///{tmp_path / 'mlflow.db'}", "fellrec", "run", {}))
    log.log_metrics({"loss": 0.5}, 0, once="round")
    log.close()
    folder, uri = tmp_path / "outbox", f"sqlite:///{tmp_path / 'other.db'}"
    first = read_sent(folder).run_id
    assert [OutboxClient(folder, uri).send(), OutboxClient(folder, uri).send()] == [3, 0]
    run_id = read_sent(folder).run_id
    assert run_id is not None
    assert run_id != first
    client = MlflowClient(uri)
    assert [(point.step, point.value) for point in client.get_metric_history(run_id, "loss")] == [(0, 0.5)]
    assert client.get_run(run_id).info.status == "FINISHED"
    client.delete_run(run_id)
    assert OutboxClient(folder, uri).send() == 3
    assert client.get_run(str(read_sent(folder).run_id)).data.metrics == {"loss": 0.5}


def test_the_progress_file_is_replaced_atomically(tmp_path: Path) -> None:
    filled(tmp_path)
    for operation in operations(tmp_path):
        write_sent(tmp_path, type(read_sent(tmp_path))(operation.number + 1, operation.end, "id"))
        assert num_left(tmp_path) == 3 - operation.number
    assert json.loads((tmp_path / "sent.json").read_text())["run_id"] == "id"
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_directory_without_an_outbox_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no outbox; give the directory of a run"):
        outboxes(tmp_path)


def test_a_comparison_sends_the_operations_of_a_run_that_ended_before_it_was_on_the_server(
    empty_store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """This is the normal order of events, so no warning is logged."""
    from mlflow.tracking import MlflowClient

    shutil.copy(empty_store, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    both = tmp_path / "both"
    for folder in (both / "outbox", both / "one"):
        folder.mkdir(parents=True)
    with sending(both / "outbox"):  # the comparison cannot send yet
        parent = RunLog(both, NewRun(uri, "fellrec", "both", {}))
        child = RunLog(both / "one", NewRun(uri, "fellrec", "one", {}, parent.uid))
        child.log_params({"seed": 0})
        deadline = time.monotonic() + 60
        while child._sender.error is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.close()
        assert num_left(both / "one" / "outbox") == 3
    parent.close()
    assert not [record for record in caplog.records if record.name.startswith("fellrec")]
    assert [num_left(folder) for folder in outboxes(both)] == [0, 0]
    found = MlflowClient(uri).get_run(child.run_id)
    assert found.data.tags["mlflow.parentRunId"] == parent.run_id
    assert (found.data.params, found.info.status) == ({"seed": "0"}, "FINISHED")
