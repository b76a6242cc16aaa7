"""One process per run directory: a file that names the owner, on any file system of a cluster.

``fcntl`` and ``flock`` need a lock daemon, which NFS and Lustre are often mounted without; then they fail, or lock on
one node only. `filelock.SoftFileLock` needs only exclusive file creation, which is atomic on all of them. It records
host and process but no SLURM job, so a lock that a killed job left on another node would stay forever. It is therefore
held only while the owner's record is read and replaced, and the record decides who has the run directory.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import SoftFileLock, Timeout

from fellrec.errors import ConfigError
from fellrec.state.files import write_json

_OWNER, _GUARD = ".lock-owner", ".lock-guard"
_GUARD_SECONDS = 60.0
"""Longest wait for processes that read or replace the record; one of them may have to ask ``squeue``."""
_RECORD: Mapping[str, Any] = {"host": str, "pid": int, "started": str, "job": str | None, "restart": int}
"""What the record has, and its types."""
_OVER = set("PENDING BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY TIMEOUT".split())
"""States in which a SLURM job has no process."""


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold a run directory. If several processes find the record of a dead owner, exactly one of them takes over.

    Raises:
        ConfigError: If another process holds the directory, or it cannot be determined whether its owner still runs.
        StorageError: If the record cannot be written.
    """
    me = _current_process()
    try:
        with SoftFileLock(run_dir / _GUARD, timeout=_GUARD_SECONDS):
            check_free(run_dir)
            write_json(run_dir / _OWNER, me)
    except Timeout as error:
        raise ConfigError(f"{run_dir / _GUARD} is held by a process; if that has ended, delete the file") from error
    except OSError as error:
        raise ConfigError(f"run directory {run_dir} cannot be used: {error}") from error
    try:
        yield
    finally:
        with suppress(OSError, ConfigError):
            if _owner(run_dir) == me:
                (run_dir / _OWNER).unlink()


def check_free(run_dir: Path) -> None:
    """Refuse a directory that is held.

    Raises:
        ConfigError: See `hold`.
    """
    owner = _owner(run_dir)
    is_alive = False if owner is None else _is_alive(owner)
    if owner is None or is_alive is False:
        return
    who = f"process {owner['pid']} on {owner['host']}" + (f", SLURM job {owner['job']}" if owner["job"] else "")
    if is_alive:
        raise ConfigError(f"run directory {run_dir} is in use by {who}; wait for it, or choose another run_dir")
    raise ConfigError(
        f"run directory {run_dir} was taken by {who}; whether that process still runs cannot be determined from this "
        f"machine. If it does not, delete {run_dir / _OWNER}"
    )


def is_lock(path: Path) -> bool:
    """Whether a file of a run directory belongs to its lock."""
    return path.name.lstrip(".").startswith("lock-")


def _owner(run_dir: Path) -> dict[str, Any] | None:
    """The record of the owner; ``None`` without one.

    Raises:
        ConfigError: If it is damaged.
    """
    path = run_dir / _OWNER
    try:
        owner = dict(json.loads(path.read_text()))
        if not all(isinstance(owner[name], kind) for name, kind in _RECORD.items()):
            raise TypeError(owner)
        return owner
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        problem = f"{path} does not name the owner of the run directory; if no process uses it, delete it"
        raise ConfigError(problem) from error


def _current_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def _is_alive(owner: Mapping[str, Any]) -> bool | None:
    """Whether the owner still runs; ``None`` if that cannot be determined from this machine."""
    me = _current_process()
    if owner["job"] is not None and owner["job"] == me["job"] and owner["restart"] < me["restart"]:
        return False  # SLURM restarts a job only after its processes have ended
    if owner["host"] == me["host"]:
        start = _start_of(owner["pid"])
        return start is not None and start == owner["started"]
    return None if owner["job"] is None else _job_runs(owner["job"])


def _start_of(pid: int) -> str | None:
    """What distinguishes a process from later ones with the same id; ``None`` if there is no such process."""
    try:
        os.kill(pid, 0)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except PermissionError:
        return "another user's"
    except (ProcessLookupError, OverflowError):
        return None
    except OSError:
        return "no /proc"  # not Linux: only the id is compared
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return None if fields[0] in "ZX" else f"{boot} {fields[19]}"


def _job_runs(job: str) -> bool | None:
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return False if "Invalid job id" in done.stderr else None
    return not set(done.stdout.split()) <= _OVER
