"""The lock of a run directory, with real processes: one holds it, and processes that have ended hold nothing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fellrec.errors import ConfigError
from fellrec.state.lock import check_free, hold

HOLD = """
import sys, time
from pathlib import Path
from fellrec.errors import ConfigError
from fellrec.state.lock import hold
sys.stdin.readline()
try:
    with hold(Path(sys.argv[1])):
        print("holds", flush=True)
        sys.stdin.readline()
except ConfigError as error:
    print("refused", error, flush=True)
"""


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


def owner(folder: Path, **changes: object) -> None:
    """Write the lock of a process that cannot be started here."""
    me = {"host": "elsewhere", "pid": 1, "started": "x", "job": None, "restart": 0}
    (folder / ".lock-owner").write_text(json.dumps({**me, **changes}))


def test_a_held_directory_is_refused_until_it_is_released(tmp_path: Path) -> None:
    holder = start(tmp_path, SLURM_JOB_ID="77")
    go(holder)
    assert answer(holder) == "holds\n"
    with pytest.raises(ConfigError) as caught, hold(tmp_path):
        pass
    assert f"is in use by process {holder.pid} on {socket.gethostname()}, SLURM job 77" in str(caught.value)
    go(holder)
    assert holder.wait(timeout=30) == 0
    with hold(tmp_path), pytest.raises(ConfigError, match="is in use"):
        check_free(tmp_path)
    check_free(tmp_path)
    assert not list(tmp_path.iterdir()), "nothing is left"


@pytest.mark.slow
def test_of_many_that_find_a_dead_owner_one_takes_over(tmp_path: Path) -> None:
    first = start(tmp_path)
    go(first)
    assert answer(first) == "holds\n"
    first.kill()
    first.wait()
    several = [start(tmp_path) for _ in range(6)]
    for process in several:
        go(process)
    answers = [answer(process).split()[0] for process in several]
    for process in several:
        process.kill()
        process.wait()
    assert sorted(answers) == ["holds", *["refused"] * 5]


def test_a_requeued_job_takes_over_from_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner(tmp_path, job="77")
    monkeypatch.setenv("PATH", "")  # no squeue: only the job's own numbers can tell
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(ConfigError, match="cannot be determined"):
        check_free(tmp_path)  # another step of this very start
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with hold(tmp_path):
        pass


def test_an_owner_that_cannot_be_determined_is_not_taken_for_dead(tmp_path: Path) -> None:
    owner(tmp_path)
    with pytest.raises(ConfigError) as caught:
        check_free(tmp_path)
    assert "process 1 on elsewhere" in str(caught.value)
    (tmp_path / ".lock-owner").unlink()  # as the message says
    check_free(tmp_path)


def test_a_number_that_another_process_got_is_not_its_owner(tmp_path: Path) -> None:
    owner(tmp_path, host=socket.gethostname(), pid=os.getppid(), started="before the last boot")
    check_free(tmp_path)


def test_a_guard_left_by_a_process_that_died_while_it_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine it is replaced; a process of another machine cannot be looked up, so the file is named."""
    guard = tmp_path / ".lock-guard"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    guard.write_text(f"{dead.pid}\n{socket.gethostname()}\n")
    with hold(tmp_path):
        pass
    guard.write_text("1\nelsewhere\n")
    monkeypatch.setattr("fellrec.state.lock._GUARD_SECONDS", 0.1)
    with pytest.raises(ConfigError, match=r"\.lock-guard is held .* delete the file"), hold(tmp_path):
        pass


def test_a_damaged_lock_is_named(tmp_path: Path) -> None:
    (tmp_path / ".lock-owner").touch()
    with pytest.raises(ConfigError, match=r"\.lock-owner does not name the owner"):
        check_free(tmp_path)
