"""An outbox keeps what was added, in order, once, whatever happens to its writer or to the server."""

from __future__ import annotations

import json
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fellrec.errors import ConfigError, TrainingError
from fellrec.tracking.delivery import OutboxClient, OutboxError
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


def test_an_outbox_cut_off_at_any_byte_keeps_its_complete_lines_and_goes_on(tmp_path: Path) -> None:
    whole = filled(tmp_path)
    for length in [0, *range(whole.index(b"kind_2"), len(whole) + 1)]:
        (tmp_path / "operations.jsonl").write_bytes(whole[:length])
        complete = whole[:length].count(b"\n")
        assert len(kinds(tmp_path)) == complete, "a reader does not see half a line"
        outbox = Outbox(tmp_path)
        assert [outbox.append("again", once=f"round {number}") for number in range(4)] == [
            number >= complete for number in range(4)
        ]
        outbox.close()
        assert kinds(tmp_path) == [f"kind_{number}" for number in range(complete)] + ["again"] * (4 - complete)
        assert [operation.number for operation in operations(tmp_path)] == [0, 1, 2, 3]


def test_zeros_at_the_end_are_dropped(tmp_path: Path) -> None:
    """What some file systems leave of a file that was growing when the power failed."""
    whole = filled(tmp_path)
    (tmp_path / "operations.jsonl").write_bytes(whole + bytes(500))
    assert len(kinds(tmp_path)) == 4
    Outbox(tmp_path).close()
    assert (tmp_path / "operations.jsonl").read_bytes() == whole


def test_damage_before_the_end_is_named_and_left_as_it_is(tmp_path: Path) -> None:
    lines = filled(tmp_path).splitlines(keepends=True)
    damaged = b"".join([lines[0], b"x" + lines[1], *lines[2:]])
    (tmp_path / "operations.jsonl").write_bytes(damaged)
    for _ in range(2):  # the refusal lets go of the outbox
        with pytest.raises(TrainingError, match=r"operations.jsonl is damaged: operation 1 cannot be read"):
            Outbox(tmp_path)
    assert (tmp_path / "operations.jsonl").read_bytes() == damaged


def test_two_writers_are_refused(tmp_path: Path) -> None:
    first = Outbox(tmp_path / "outbox")
    with pytest.raises(ConfigError, match=f"{tmp_path} is being written by another process"):
        Outbox(tmp_path / "outbox")
    first.close()
    Outbox(tmp_path / "outbox").close()


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow above 300 bytes: what a full disk does to a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_disk_that_is_full_leaves_no_half_line(tmp_path: Path, small_files: None) -> None:
    outbox = Outbox(tmp_path)
    outbox.append("fits")
    with pytest.raises(TrainingError, match=r"operations.jsonl cannot be written: .*File too large"):
        outbox.append("too_long", text="x" * 400)
    outbox.append("fits_again")
    assert kinds(tmp_path) == ["fits", "fits_again"]
    assert (tmp_path / "operations.jsonl").read_bytes().endswith(b"}\n")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file/outbox cannot be written"):
        Outbox(tmp_path / "file" / "outbox")


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that lets everybody in and says nothing; yields its address."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_server_that_hangs_holds_nothing_up(tmp_path: Path, mute: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, NewRun(mute, "fellrec", "run", {"data": "none"}))
    for step in range(50):
        log.log_metrics({"loss": 1 / (step + 1), "not: allowed": 1}, step, once="round")
    assert read_sent(tmp_path / "outbox").number == 0
    log.close()
    assert num_left(tmp_path / "outbox") == 52
    shown = capsys.readouterr().err
    assert "did not take operation 0 (create)" in shown
    assert f"52 operations for MLflow are kept in {tmp_path}; send them by: fellrec sync {tmp_path}" in shown


def test_a_resumed_run_logs_what_is_new(tmp_path: Path) -> None:
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


def test_a_store_that_does_not_hold_the_run_says_so_and_nothing_is_dropped(tmp_path: Path) -> None:
    log = RunLog(tmp_path, NewRun(f"sqlite:///{tmp_path / 'mlflow.db'}", "fellrec", "run", {}))
    log.close()
    outbox = Outbox(tmp_path / "outbox")
    outbox.append("tag", key="late", value="tag")
    outbox.close()
    before = read_sent(outbox.folder)
    with pytest.raises(OutboxError, match=rf"did not take operation 2 \(tag\).*{before.run_id}"):
        OutboxClient(outbox.folder, uri=f"sqlite:///{tmp_path / 'other.db'}").send()
    assert (read_sent(outbox.folder), num_left(outbox.folder)) == (before, 1)


def test_the_note_of_what_was_sent_is_replaced_as_a_whole(tmp_path: Path) -> None:
    filled(tmp_path)
    for operation in operations(tmp_path):
        write_sent(tmp_path, type(read_sent(tmp_path))(operation.number + 1, operation.end, "id"))
        assert num_left(tmp_path) == 3 - operation.number
    assert json.loads((tmp_path / "sent.json").read_text())["run_id"] == "id"
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_only_a_run_has_an_outbox(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no outbox; give the directory of a run"):
        outboxes(tmp_path)


def test_a_comparison_sends_what_a_run_left_that_ended_before_the_server_knew_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is wrong on the way, so nothing is said."""
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    both = tmp_path / "both"
    for folder in (both / "outbox", both / "one"):
        folder.mkdir(parents=True)
    with sending(both / "outbox"):  # what the comparison has to say waits
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
