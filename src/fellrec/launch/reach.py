"""Checks that processes on this machine can communicate, with a small all-reduce."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

_SECONDS = 60


def check_all_reduce(backend: str, num_processes: int) -> str:
    """Start processes that sum their ranks with an all-reduce.

    Args:
        backend: ``"gloo"``, over the loopback interface unless ``GLOO_SOCKET_IFNAME`` is set, or ``"nccl"``.
        num_processes: At least 1; for NCCL at most the number of GPUs.

    Returns:
        Number of processes and network interface, as text.

    Raises:
        RuntimeError: If the all-reduce fails.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME") or ("lo" if sys.platform == "linux" else "lo0")
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": interface}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, backend, str(rank), str(num_processes), str(store)],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(num_processes)
        ]
        try:
            errors = [process.communicate(timeout=2 * _SECONDS)[1].strip() for process in processes]
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"{backend}: {num_processes} processes did not connect in {2 * _SECONDS} s") from error
        finally:
            for process in processes:
                process.kill()
                process.wait()
    for process, text in zip(processes, errors, strict=True):
        if process.returncode != 0:
            raise RuntimeError(f"{backend}: {text.splitlines()[-1] if text else f'exit status {process.returncode}'}")
    where = f" over {interface}" if backend == "gloo" else ""
    return f"{num_processes} process{'es' if num_processes > 1 else ''}{where}"


def _all_reduce(backend: str, rank: int, num_processes: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(
        backend, f"file://{store}", timeout=timedelta(seconds=_SECONDS), world_size=num_processes, rank=rank
    )
    total = torch.tensor([rank + 1.0], device=device)
    dist.all_reduce(total)
    expected = num_processes * (num_processes + 1) / 2
    if total.item() != expected:
        raise RuntimeError(f"the sum is {total.item()}, expected {expected}")
    dist.destroy_process_group()


if __name__ == "__main__":
    _all_reduce(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
