"""How much memory a process has used, and how much there is."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch


def peak_bytes() -> int:
    """Largest memory of this process so far, in bytes: the accelerator's if it uses one, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def anonymous_bytes() -> int:
    """This process's memory now that the kernel cannot drop and read again: pages of mapped files are not in it.

    Raises:
        OSError: On a system without ``/proc/self/status``.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status does not tell RssAnon")


def total_bytes() -> int:
    """This machine's memory, in bytes, whatever is used of it."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
