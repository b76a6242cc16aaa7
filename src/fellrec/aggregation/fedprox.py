"""FedProx (Li et al., MLSys 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fellrec.aggregation.mean import MeanRule
from fellrec.aggregation.settings.averages import FedProxSettings
from fellrec.federated.terms import LocalTerm, TermContext
from fellrec.types import Adapter


@dataclass(frozen=True)
class Proximal(LocalTerm):
    """The loss ``strength / 2 * ‖v − w‖²``, w the received adapter; its gradient is ``strength * (v − w)``.

    It is 0 at the first step of a round. Inside AdamW the gradient is preconditioned, as that of the data.
    """

    strength: float

    def loss(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Tensor | None:
        """See ``LocalTerm``; ``None`` for strength 0."""
        if not self.strength or not parameters:
            return None
        return self.strength / 2 * squared_distance(parameters, context.received)


def squared_distance(parameters: Mapping[str, nn.Parameter], anchor: Adapter) -> Tensor:
    """``‖v − anchor‖²`` of some parameters, at least one; each term of the sum has one parameter only."""
    squares = [(value - anchor[name]).square().sum() for name, value in parameters.items()]
    return sum(squares[1:], squares[0])


class FedProx(MeanRule, FedProxSettings):
    """FedAvg whose clients are held near the model that they received."""

    def __post_init__(self) -> None:
        """Make the local term."""
        super().__post_init__()
        self.local_terms = [Proximal(self.mu)]
