"""How much memory a process has used."""

from __future__ import annotations

import resource

import torch


def peak_bytes() -> int:
    """Largest memory of this process so far, in bytes: the accelerator's if it uses one, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
