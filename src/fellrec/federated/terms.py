"""Local terms: what a rule adds to the local objective of a client, as a loss or as a correction of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fellrec.types import Adapter


@dataclass
class TermContext:
    """What a local term may use while one client trains in one round.

    With an executed cut, client and server have a context each, with their own parameters in it.

    Attributes:
        received: Adapter that the client received, by parameter.
        anchors: Other adapters of the job, by name.
        tensors: Tensors of the client, by name and parameter.
        learning_rate: Of the optimiser step that is being taken.
        num_steps: Optimiser steps taken so far in this round.
        total_steps: Optimiser steps that the round is going to take.
        kept: Tensors that the term keeps from step to step, by name; empty when the round begins.
    """

    received: Adapter
    anchors: Mapping[str, Adapter] = field(default_factory=dict)
    tensors: Mapping[str, Adapter] = field(default_factory=dict)
    learning_rate: float = 0.0
    num_steps: int = 0
    total_steps: int = 0
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class LocalTerm:
    """Base of local terms; override what is needed.

    A term must treat every parameter on its own: with an executed cut it runs on both sides, and neither side has the
    parameters of the other. It is called after the gradients of all batches of an optimiser step are summed, and before
    they are clipped.

    Example:
        The proximal term of FedProx, μ/2 · ‖v − w‖²:

        >>> class Proximal(LocalTerm):
        ...     def loss(self, parameters, context):
        ...         return sum(0.005 * (v - context.received[k]).square().sum() for k, v in parameters.items())
    """

    def loss(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Tensor | None:
        """A loss on the parameters, whose gradients are added to those of the data; ``None`` for no loss."""

    def correct(self, gradients: Mapping[str, Tensor], context: TermContext) -> None:
        """Change the gradients of the step in place, such as by control variates."""

    def trains(self, name: str, context: TermContext) -> bool:
        """Whether a parameter is trained in the step that is being taken; if not, neither it nor its moments change."""
        return True

    def finish(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Mapping[str, Adapter]:
        """The client's tensors after the round, by name and parameter; those that are absent stay as they are."""
        return {}
