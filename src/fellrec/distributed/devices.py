"""How fast a device multiplies matrices, and waiting for it."""

from __future__ import annotations

import time

import torch


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 20) -> float:
    """FLOPs per second of the product of two ``[size, size]`` matrices, the best of ``repeats`` after one more."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2))
    left @ right
    seconds = []
    for _ in range(repeats):
        wait_for(device)
        started = time.perf_counter()
        left @ right
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return float(2 * size**3 / min(seconds))


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
