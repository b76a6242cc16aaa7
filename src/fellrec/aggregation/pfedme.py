"""pFedMe (Dinh et al., NeurIPS 2020): personal models from Moreau envelopes of the clients' losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.fedprox import squared_distance
from fellrec.aggregation.settings.personalised import PFedMeSettings
from fellrec.errors import TrainingError
from fellrec.federated.records import Aggregated, Updates
from fellrec.federated.terms import LocalTerm, TermContext
from fellrec.functional.stacks import as_lazy
from fellrec.types import Adapter

LOCAL, SHARED = "local", "shared"
"""Names of w_k among a client's tensors, and of w among the anchors."""


@dataclass(frozen=True)
class Envelope(LocalTerm):
    """The loss ``lam / 2 * ‖θ − w_k‖²``; every ``inner_steps`` steps, and at the end, ``w_k ← w_k − rate (w_k − θ)``.

    w_k starts a round at the shared model w.
    """

    lam: float
    inner_steps: int
    rate: float

    def loss(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Tensor | None:
        """See ``LocalTerm``."""
        if not parameters:
            return None
        if context.num_steps and context.num_steps % self.inner_steps == 0:
            self._move(parameters, context)
        return self.lam / 2 * squared_distance(parameters, self._local(parameters, context))

    def finish(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Mapping[str, Adapter]:
        """See ``LocalTerm``: w_k."""
        self._move(parameters, context)
        return {LOCAL: self._local(parameters, context)}

    def _local(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> dict[str, Tensor]:
        if LOCAL not in context.kept:
            shared = context.anchors.get(SHARED, context.received)  # all start at the initial adapter
            context.kept[LOCAL] = {name: shared[name].to(value.dtype) for name, value in parameters.items()}
        return context.kept[LOCAL]

    @torch.no_grad()
    def _move(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> None:
        local = self._local(parameters, context)
        context.kept[LOCAL] = {n: local[n] + self.rate * (value - local[n]) for n, value in parameters.items()}


class PFedMe(AggregationCallback, PFedMeSettings):
    """``w ← (1 − β) w + β Σ p_k w_k``; the personal models θ_k are evaluated and never leave their clients.

    The paper minimises ``F_k(θ) + λ/2 ‖θ − w_k‖²`` approximately by K gradient steps on one batch before it moves w_k;
    here each of the K optimiser steps has a batch of its own. θ_k and its optimiser state persist over rounds, as in
    the authors' program.
    """

    client_tensors = (LOCAL,)
    keeps_trained = True

    def __post_init__(self) -> None:
        """Make the local term."""
        super().__post_init__()
        self.local_terms = [Envelope(self.lam, self.inner_steps, self.outer_rate)]
        self._shared: dict[str, Tensor] = {}

    def begin(self, initial: Mapping[str, Tensor]) -> None:
        """Start with the initial adapter as the shared model."""
        self._shared = {name: tensor.double() for name, tensor in initial.items()}

    def _anchors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """The shared model."""
        return {SHARED: {name: tensor.float() for name, tensor in self._shared.items()}}

    def exchanges(self, name: str, round_index: int) -> bool:
        """Nothing of θ_k; w_k is a tensor of the client."""
        return False

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move the shared model, which is kept in float64.

        Raises:
            TrainingError: If clients returned no w_k.
        """
        if LOCAL not in updates.tensors:
            raise TrainingError(f"aggregation {self.name}: clients {list(updates.clients)} returned no {LOCAL} model")
        weights, local = self.client_weights(updates, self.weights), as_lazy(updates.tensors[LOCAL])
        for name in local:
            mean = torch.cat([(weights @ block.double()).cpu() for _, block in local.blocks(name)])
            shared = self._shared[name]
            self._shared[name] = (1 - self.beta) * shared + self.beta * mean.reshape(shared.shape)
        return Aggregated({}, per_client={"update_weight": weights}, anchors=self._anchors())

    def state_dict(self) -> dict[str, Any]:
        """The shared model by parameter."""
        return dict(self._shared)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._shared = dict(state)
