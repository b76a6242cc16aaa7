"""Settings of the cut through the model: ``split``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fellrec.federated.settings import TrainerSettings
from fellrec.functional.ranges import Natural, Seconds, check

Packing = Literal["float32", "bfloat16", "int8"]
"""How a tensor is sent: as it is, halved, or one byte a number with a scale for each token."""


@dataclass(frozen=True)
class SplitSettings:
    """Where the model is cut into head, body and tail, and whether the cut is executed."""

    head_layers: Natural = 1
    """Layers on the client after the embedding."""
    tail_layers: Natural = 1
    """Layers on the client before the LM head."""
    transport: Literal["none", "inprocess", "distributed"] = "none"
    """none: one model, the cut is not executed, with the same results. inprocess: a server in the same process.
    distributed: a server in a process of its own, under torchrun or srun."""
    hidden_dtype: Packing = "float32"
    """How hidden states are sent."""
    gradient_dtype: Packing = "float32"
    """How gradients are sent."""
    timeout_seconds: Seconds = TrainerSettings.timeout_seconds
    """With ``transport=distributed``: longest time without a message from a process that is waited for."""

    def __post_init__(self) -> None:
        """Check all ranges."""
        check(self, "split")
