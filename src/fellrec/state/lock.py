"""One run directory, one process: a lock file that works on the file systems of clusters.

``fcntl`` and ``flock`` need a lock daemon, which NFS and Lustre are often mounted without; then they fail, or lock on
one node only. Here a lock is a file that is created exclusively, which all of them do atomically, and that says who
holds it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fellrec.errors import ConfigError

_PREFIX = ".lock-"
_PATIENCE_SECONDS = 2.0
"""A file stays empty for an instant while its owner writes its name."""
_OVER = {
    "PENDING",
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "TIMEOUT",
}
"""States in which a job of SLURM has no process."""


@contextmanager
def hold(run_dir: Path) -> Iterator[None]:
    """Hold a run directory.

    The files are numbered and the highest number counts; it is released by a word in it and stays. So of several
    processes that find a lock whose owner is dead, just one can create the next number.

    Raises:
        ConfigError: If another process holds the directory, or nobody here can tell whether it still runs.
    """
    path = _take(run_dir)
    try:
        yield
    finally:
        with suppress(OSError):
            path.write_text(json.dumps({"released": True}))


def check_free(run_dir: Path) -> int:
    """Refuse a directory that is held.

    Returns:
        The number of its last lock, 0 before the first.

    Raises:
        ConfigError: See `hold`.
    """
    last = _last(run_dir)
    if not last:
        return 0
    path = run_dir / f"{_PREFIX}{last}"
    owner = _owner(path)
    if owner is None or owner.get("released"):
        return last
    alive = _is_alive(owner)
    if alive is False:
        return last
    who = f"process {owner['pid']} on {owner['host']}" + (f", SLURM job {owner['job']}" if owner["job"] else "")
    if alive:
        raise ConfigError(f"run directory {run_dir} is in use by {who}; wait for it, or choose another run_dir")
    raise ConfigError(
        f"run directory {run_dir} was taken by {who}, and whether that still runs cannot be seen from here; "
        f"if it does not, delete {path}"
    )


def is_lock(path: Path) -> bool:
    """Whether a file of a run directory is a lock."""
    return path.name.startswith(_PREFIX)


def _take(run_dir: Path) -> Path:
    while True:
        number = check_free(run_dir) + 1
        path = run_dir / f"{_PREFIX}{number}"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            continue  # another process was faster: see who it is
        except OSError as error:
            raise ConfigError(f"run directory {run_dir} cannot be used: {error}") from error
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(_myself()))
            file.flush()
            os.fsync(file.fileno())
        if _last(run_dir) != number:  # a listing from a cache was too old
            path.unlink()
            continue
        for old in range(1, number):
            (run_dir / f"{_PREFIX}{old}").unlink(missing_ok=True)
        return path


def _last(run_dir: Path) -> int:
    return max((int(path.name.removeprefix(_PREFIX)) for path in run_dir.glob(f"{_PREFIX}*")), default=0)


def _owner(path: Path) -> dict[str, Any] | None:
    """What a lock says; ``None`` if it is gone.

    Raises:
        ConfigError: If it says nothing: its owner died in the instant of taking it.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            return dict(json.loads(path.read_text()))
        except FileNotFoundError:
            return None
        except ValueError:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{path} does not say who holds the run directory; if nobody does, delete it"
                ) from None
            time.sleep(0.05)


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }


def _is_alive(owner: Mapping[str, Any]) -> bool | None:
    """Whether a lock's owner still runs; ``None`` if that cannot be seen from here."""
    me = _myself()
    if owner["job"] is not None and owner["job"] == me["job"] and owner["restart"] < me["restart"]:
        return False  # SLURM starts a job again only after its processes are gone
    if owner["host"] == me["host"]:
        started = _started(owner["pid"])
        return started is not None and started == owner["started"]
    return None if owner["job"] is None else _job_runs(owner["job"])


def _started(pid: int) -> str | None:
    """What tells a process from later ones with its number; ``None`` if there is none."""
    try:
        os.kill(pid, 0)
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except PermissionError:
        return "another user's"
    except ProcessLookupError:
        return None
    except OSError:
        return "no /proc"  # not Linux: its number must do
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
