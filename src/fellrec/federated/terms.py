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
        beside: For a `SecondModel`, the adapter that the client trains beside it, as it is now.
    """

    received: Adapter
    anchors: Mapping[str, Adapter] = field(default_factory=dict)
    tensors: Mapping[str, Adapter] = field(default_factory=dict)
    learning_rate: float = 0.0
    num_steps: int = 0
    total_steps: int = 0
    kept: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    beside: Mapping[str, Tensor] = field(default_factory=dict)


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


class SecondModel(LocalTerm):
    """Base of a second model that clients train beside their adapter; override what is needed.

    Every optimiser step has a second pass over its batches before that of the adapter, with the same random numbers.
    The second model has an optimiser of its own, with the adapter's learning rate and clipping, and never leaves its
    client: its values are tensors of the client named ``second``. The methods of `LocalTerm` are about its parameters.
    It is not available with an executed cut.
    """

    def point(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Mapping[str, Tensor]:
        """Values at which the gradient of the step is taken; by default those of the second model.

        Args:
            parameters: Of the second model; not to be changed.
            context: With the adapter as ``beside``.
        """
        return parameters
