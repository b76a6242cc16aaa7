"""The other ranks of a run on one machine, started by the first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.distributed import TCPStore

_PATIENCE_SECONDS = 20.0
"""How long the other ranks may take to leave after the first is done."""


@contextmanager
def other_ranks(num_others: int, command: Sequence[str]) -> Iterator[None]:
    """Start ranks 1 and up with the same command line, and be rank 0 while this lasts; nothing happens without others.

    Every rank finds what torchrun would have told it in its environment. The processors are shared out among the ranks
    unless ``OMP_NUM_THREADS`` says how many threads each has.

    Args:
        num_others: Ranks to start.
        command: Arguments of ``python -m fellrec``.
    """
    if not num_others:
        yield
        return
    num_ranks = num_others + 1
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // num_ranks))
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "TORCHELASTIC_RUN_ID": "fellrec",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is this one; rank 0 need not open it
        "OMP_NUM_THREADS": threads,
    }
    before = dict(os.environ)
    environment = before | shared
    others = [
        subprocess.Popen(
            [sys.executable, "-m", "fellrec", *command],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdin=subprocess.DEVNULL,
        )
        for rank in range(1, num_ranks)
    ]
    os.environ.update(shared | {"RANK": "0", "LOCAL_RANK": "0"})
    torch.set_num_threads(int(threads))
    try:
        yield
    finally:
        for process in others:
            try:
                process.wait(_PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        os.environ.clear()
        os.environ.update(before)
