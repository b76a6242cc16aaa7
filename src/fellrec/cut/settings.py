"""Settings of the cut through the model: ``split``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from fellrec.federated.settings import TrainerSettings
from fellrec.functional.by_size import PerClient
from fellrec.functional.ranges import Natural, Seconds, check, per_client, refuse

Packing = Literal["float32", "bfloat16", "int8"]
"""How a tensor is sent: as it is, halved, or one byte a number with a scale for each token."""

Depths = Annotated[PerClient, per_client(0, "numbers", "{0: 1, 500: 4}")]


@dataclass(frozen=True)
class SplitSettings:
    """Where the model is cut into head, body and tail, and whether the cut is executed."""

    head_layers: Depths = 1
    """Layers on the client after the embedding; or, with ``transport=inprocess``, a list with those of each client, or
    numbers by its training samples, such as {0: 1, 500: 4}: from 500 samples on, four layers."""
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
        """Check all ranges, and that a cut which differs between clients is executed in one process."""
        check(self, "split")
        if not isinstance(self.head_layers, int) and self.transport != "inprocess":
            refuse(
                f"split.head_layers={self.head_layers} gives clients different heads, which needs "
                f"split.transport=inprocess, not {self.transport}"
            )
