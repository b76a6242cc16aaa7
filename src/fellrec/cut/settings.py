"""Settings of the cut through the model: ``split``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from fellrec.federated.settings import TrainerSettings
from fellrec.functional.by_size import PerClient
from fellrec.functional.ranges import Natural, NotNegative, Positive, Seconds, check, per_client, refuse

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
    hidden_clip: Positive | None = None
    """Largest L2 norm of a token's hidden state that a client sends, in training and in evaluation; null: no limit."""
    hidden_noise: NotNegative = 0.0
    """Standard deviation of Gaussian noise in each entry of the hidden states that a client sends, after clipping. It
    makes them harder to read; no ε is claimed."""
    gradient_clip: Positive | None = None
    """Largest L2 norm of a token's gradient that a client sends; null: no limit."""
    gradient_noise: NotNegative = 0.0
    """Standard deviation of Gaussian noise in each entry of the gradients that a client sends, after clipping."""
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


_OF_MESSAGES = ("hidden_dtype", "gradient_dtype", "hidden_clip", "hidden_noise", "gradient_clip", "gradient_noise")
UNCHANGED: Mapping[str, Any] = {
    field.name: field.default for field in fields(SplitSettings) if field.name in _OF_MESSAGES
}
"""Settings with which tensors are sent as they are."""


def is_changed(split: Mapping[str, Any]) -> bool:
    """Whether hidden states are sent in another form than they have, which changes what is ranked.

    Args:
        split: The group ``split``; settings that are absent have their defaults.
    """
    return any(split.get(name, UNCHANGED[name]) != UNCHANGED[name] for name in UNCHANGED if name.startswith("hidden"))
