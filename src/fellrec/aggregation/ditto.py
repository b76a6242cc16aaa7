"""Ditto (Li et al., ICML 2021): a shared model, and personal ones that are held near it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fellrec.aggregation.fedprox import squared_distance
from fellrec.aggregation.mean import MeanRule
from fellrec.aggregation.settings.personalised import DittoSettings
from fellrec.federated.populations import SharedAndPersonal
from fellrec.federated.terms import LocalTerm, TermContext


@dataclass(frozen=True)
class NearShared(LocalTerm):
    """The loss ``strength / 2 * ‖v − w‖²`` of a personal model, w the shared model that the client received."""

    strength: float

    def loss(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Tensor | None:
        """See ``LocalTerm``; ``None`` for the shared model."""
        if not self.strength or not parameters or "shared" not in context.anchors:
            return None
        return self.strength / 2 * squared_distance(parameters, context.anchors["shared"])


class Ditto(MeanRule, DittoSettings):
    """FedAvg for the shared model; beside it each client trains a personal one, which is evaluated and never leaves."""

    population = SharedAndPersonal

    def __post_init__(self) -> None:
        """Make the local term."""
        super().__post_init__()
        self.local_terms = [NearShared(self.lam)]
