"""What processes of one run must have in common beside their configuration."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from fellrec.data.prepared import PreparedData

_SAMPLED = 16
"""Values of each of the model's tensors that go into its digest."""


def fingerprint(data: PreparedData, model: nn.Module, device: torch.device) -> dict[str, str]:
    """What shapes the numbers and is not in the configuration, as text by name."""
    found = {
        "torch version": torch.__version__,
        "data's key": data.key,
        "backbone's weights": digest(model),
        "device": device.type,
    }
    if device.type == "cpu":  # the order of sums depends on it
        found["number of threads (OMP_NUM_THREADS)"] = str(torch.get_num_threads())
    return found


def differences(first: dict[str, str], second: dict[str, str]) -> str:
    """Name what differs; empty if nothing does.

    Example:
        >>> differences({"a": "1", "b": "2"}, {"a": "1", "b": "3"})
        'b: 2 and 3'
    """
    names = [name for name in sorted({*first, *second}) if first.get(name) != second.get(name)]
    return "; ".join(f"{name}: {first.get(name)} and {second.get(name)}" for name in names)


def digest(model: nn.Module) -> str:
    """A hash of names, shapes and first values of all parameters, before anything is trained."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        found.update(f"{name} {list(parameter.shape)}".encode())
        found.update(parameter.detach().flatten()[:_SAMPLED].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]
