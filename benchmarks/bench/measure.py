"""Wall and CPU seconds of a command, its descendants included."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Seconds:
    """What a command took.

    Attributes:
        wall: Seconds on the clock.
        cpu: Seconds of all cores, of the command and its descendants.
        status: Exit status.
        output: What it printed.
    """

    wall: float
    cpu: float
    status: int
    output: str


def run(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> Seconds:
    """Run a command in a folder, under a process that adopts what it leaves behind, so that its CPU time counts."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "seconds.json"
    file.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-S", __file__, str(file), *command],
        cwd=folder,
        env=dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    found = json.loads(file.read_text())
    return Seconds(found["wall"], found["cpu"], found["status"], done.stdout)


def main(file: str, *command: str) -> None:
    """Run the command and write its seconds."""
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started = time.perf_counter()
    status = subprocess.run(command, check=False).returncode
    wall = time.perf_counter() - started
    try:
        while True:
            os.wait()
    except ChildProcessError:
        pass
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    Path(file).write_text(json.dumps({"wall": wall, "cpu": used.ru_utime + used.ru_stime, "status": status}))


if __name__ == "__main__":
    main(*sys.argv[1:])
