"""Real processes of one command: started one by one as torchrun and srun start them, or by the command itself."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from preloaded import STAND_IN, Preloaded, program
from safetensors.torch import load_file

from fellrec.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
LONGEST_SECONDS = 300
"""No test waits longer for anything."""
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "fellrec")
"""Arguments of Python that start three processes of ``fellrec``."""
FELLREC = ("-m", "fellrec")
"""Arguments of Python for one process, which starts the others by Fabric if they are not numbered already."""


def environment() -> dict[str, str]:
    """One thread, so that sums are added in the same order everywhere; these sources, wherever they are.

    Processes that Fabric and torchrun start begin at once, see `preloaded.program`.
    """
    source = str(ROOT / "src")
    paths = [source, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **own, STAND_IN: program(), "PYTHON_EXEC": program()}


def free_port() -> int:
    """A port of the loopback interface that is not in use."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Processes:
    """Processes whose output is read.

    Args:
        commands: Arguments of ``python`` for each process.
        folder: Their working directory.
        are_one_run: Whether they are the processes of one run, numbered as torchrun numbers them.
    """

    def __init__(self, commands: Sequence[Sequence[str]], folder: Path, are_one_run: bool = True) -> None:
        self.lines: list[list[str]] = [[] for _ in commands]
        self._processes, self._readers = [], []
        port = free_port()
        for number, command in enumerate(commands):
            numbering = {
                "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": len(commands), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "GROUP_RANK": 0, "LOCAL_WORLD_SIZE": len(commands),
                "FELLREC_SECRET": "the secret of these tests",
            } if are_one_run else {}  # fmt: skip
            own = {key: str(value) for key, value in numbering.items()}
            process = Preloaded(command, folder, {**environment(), **own})
            reader = threading.Thread(target=self._read, args=(number, process), daemon=True)
            reader.start()
            self._processes.append(process)
            self._readers.append(reader)

    @property
    def pids(self) -> list[int]:
        """The operating system's numbers of the processes."""
        return [process.pid for process in self._processes]

    def wait_for(self, text: str, process: int = 0) -> None:
        """Wait until a process has printed a text."""
        end = time.monotonic() + LONGEST_SECONDS
        while not any(text in line for line in self.lines[process]):
            assert self._processes[process].poll() is None, self.output(process)
            assert time.monotonic() < end, self.output(process)
            time.sleep(0.005)

    def send(self, process: int, number: signal.Signals) -> None:
        """Send a signal to one process."""
        self._processes[process].send_signal(number)

    def children(self, process: int = 0) -> dict[int, int]:
        """The processes that one of them started for the run: local number → process id."""
        tasks = Path(f"/proc/{self._processes[process].pid}/task").glob("*/children")
        found = {}
        for pid in (int(pid) for task in tasks for pid in task.read_text().split()):
            variables = dict(
                item.partition(b"=")[::2] for item in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            )
            if b"fellrec" in Path(f"/proc/{pid}/cmdline").read_bytes() and b"LOCAL_RANK" in variables:
                found[int(variables[b"LOCAL_RANK"])] = pid
        return found

    def wait(self) -> list[int]:
        """Exit codes of all processes, which must all end in time; those that do not are killed."""
        end = time.monotonic() + LONGEST_SECONDS
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self._processes]
        finally:
            self.kill()

    def kill(self) -> None:
        """End all processes that still run, and read what they printed."""
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.wait()
        for reader in self._readers:
            reader.join(timeout=10)

    def output(self, process: int = 0) -> str:
        """What a process printed; with it, what processes printed that it started."""
        return "".join(self.lines[process])

    def errors(self, process: int = 0) -> list[str]:
        """The messages with which ``fellrec train`` or ``fellrec compare`` ended."""
        return [line for line in self.lines[process] if line.startswith(("fellrec train: ", "fellrec compare: "))]

    def _read(self, number: int, process: Preloaded) -> None:
        for line in process.stdout:
            self.lines[number].append(line)


def alone(arguments: Sequence[str]) -> None:
    """Run a command in this process, with one thread as the other processes have: the order of sums depends on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main(arguments)
    finally:
        torch.set_num_threads(threads)


def checkpoint(run_dir: Path) -> dict[str, Any]:
    """The states in the newest checkpoint, with their tensors in place of the files' names."""
    manifest = json.loads(max((run_dir / "checkpoints").glob("round_*.json")).read_text())
    folder = run_dir / "checkpoints" / "tensors"

    def decoded(value: Any) -> Any:
        if isinstance(value, dict) and set(value) == {"$stored"}:
            return load_file(folder / value["$stored"])
        if isinstance(value, dict):
            return {key: decoded(item) for key, item in value.items()}
        return [decoded(item) for item in value] if isinstance(value, list) else value

    content = manifest.get("content", manifest)
    found: dict[str, Any] = decoded(content["states"])
    return found


def adapters(run_dir: Path) -> list[dict[str, torch.Tensor]]:
    """Every client's whole adapter after the last round."""
    found: list[dict[str, torch.Tensor]] = checkpoint(run_dir)["population"]["adapters"]
    return found


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Compare nested values bit by bit; the message says where they differ."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, value in enumerate(expected):
            assert_same(found[place], value, f"{where}/{place}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


def results(run_dir: Path) -> dict[str, Any]:
    """All figures of a run's test but those of time and memory."""
    found = json.loads((run_dir / "results.json").read_text())
    return {name: value for name, value in found.items() if name != "cost"}


def assert_same_run(found: Path, expected: Path, has_same_ledger: bool = True) -> None:
    """Two runs agree in every bit.

    Compared are adapters, optimiser states, own tensors and selection of all clients, the matrices of every round,
    exported adapters, and the test results of every client and user.

    Args:
        found: A run directory.
        expected: Another one.
        has_same_ledger: Whether the same tensors cross between clients and server.
    """
    ours, theirs = checkpoint(found), checkpoint(expected)
    for part in ("progress", "population", "selection", "rule"):
        left, right = (
            {key: value for key, value in states[part].items() if key != "number"} for states in (ours, theirs)
        )
        assert_same(left, right, part)  # the number is that of the next file
    assert _files(found, "adapters/**/*") == _files(expected, "adapters/**/*")
    exported = _files(expected, "adapters/**/*.safetensors")
    assert exported
    for name in exported:
        assert_same(load_file(found / name), load_file(expected / name), str(name))
    matrices = _files(expected, "matrices.npz")
    assert _files(found, "matrices.npz") == matrices
    of_users = [Path(name) for name in ("clients.csv", "users.parquet", "rankings.parquet")]
    for name in [*matrices, *of_users, *([Path("ledger.csv")] if has_same_ledger else [])]:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    assert results(found) == results(expected)


def _files(run_dir: Path, pattern: str) -> list[Path]:
    return sorted(path.relative_to(run_dir) for path in run_dir.glob(pattern) if path.is_file())
