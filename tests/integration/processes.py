"""Real processes of one distributed run, started by hand as torchrun and srun start them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONGEST_SECONDS = 300
"""No test waits longer: nobody hangs."""


def environment() -> dict[str, str]:
    """One thread, so that sums are added in the same order everywhere; these sources, wherever they are."""
    source = str(ROOT / "src")
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(paths)}


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Processes:
    """The ranks of one run.

    Args:
        commands: Arguments of ``python`` for each rank.
        folder: Where they run.
    """

    def __init__(self, commands: Sequence[Sequence[str]], folder: Path) -> None:
        self.lines: list[list[str]] = [[] for _ in commands]
        self._processes, self._readers = [], []
        port = free_port()
        for rank, command in enumerate(commands):
            place = {
                "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": len(commands),
            }  # fmt: skip
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder,
                env={**environment(), **{key: str(value) for key, value in place.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            reader = threading.Thread(target=self._read, args=(rank, process), daemon=True)
            reader.start()
            self._processes.append(process)
            self._readers.append(reader)

    def wait_for(self, text: str, rank: int) -> None:
        """Wait until a rank has printed something."""
        end = time.monotonic() + LONGEST_SECONDS
        while not any(text in line for line in self.lines[rank]):
            assert self._processes[rank].poll() is None, self.output(rank)
            assert time.monotonic() < end, self.output(rank)
            time.sleep(0.005)

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to one rank."""
        self._processes[rank].send_signal(number)

    def wait(self) -> list[int]:
        """Exit codes of all ranks, which must all end in time; the rest is killed."""
        end = time.monotonic() + LONGEST_SECONDS
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self._processes]
        finally:
            self.kill()

    def kill(self) -> None:
        """End all ranks that still run, and read what they printed."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        for reader in self._readers:
            reader.join(timeout=10)

    def output(self, rank: int) -> str:
        """What a rank printed."""
        return "".join(self.lines[rank])

    def _read(self, rank: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            self.lines[rank].append(line)
