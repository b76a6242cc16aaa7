"""SCAFFOLD (Karimireddy et al., ICML 2020): control variates against the drift of clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.averages import ScaffoldSettings
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Aggregated, Updates
from fellrec.federated.terms import LocalTerm, TermContext
from fellrec.functional.stacks import as_lazy
from fellrec.types import Adapter

CONTROL = "control"
"""Name of a client's control variate c_k among its tensors, and of the server's c among the anchors."""


class ControlVariates(LocalTerm):
    """Adds ``c − c_k`` to every gradient; afterwards c_k is the mean of the round's gradients without it.

    The gradients are those before they are corrected and clipped. A variate that is not known yet is 0.
    """

    def correct(self, gradients: Mapping[str, Tensor], context: TermContext) -> None:
        """See ``LocalTerm``."""
        sums = context.kept.setdefault("sum", {})
        own, common = context.tensors.get(CONTROL, {}), context.anchors.get(CONTROL, {})
        for name, gradient in gradients.items():
            sums[name] = sums[name] + gradient if name in sums else gradient.clone()
            if name in common:
                gradient.add_(common[name])
            if name in own:
                gradient.sub_(own[name])

    def finish(self, parameters: Mapping[str, nn.Parameter], context: TermContext) -> Mapping[str, Adapter]:
        """See ``LocalTerm``; parameters that had no gradient keep their variate."""
        return {CONTROL: {name: total / context.num_steps for name, total in context.kept.get("sum", {}).items()}}


class Scaffold(AggregationCallback, ScaffoldSettings):
    """``w ← w + η_s Σ p_k Δ_k`` and ``c ← c + Σ_S (c_k⁺ − c_k) / C``; clients that are absent keep c_k.

    The paper's c_k⁺ by option II, ``c_k − c + (w − w_k) / (K η)``, holds for SGD with one learning rate. With AdamW,
    clipping or a schedule it is not a gradient; here c_k⁺ is the mean of the local gradients, which for plain SGD is
    the same. (Option I takes the gradient at the received model instead, for another pass over the data.)
    """

    population = SharedModel
    local_terms = (ControlVariates(),)
    client_tensors = (CONTROL,)

    def __post_init__(self) -> None:
        """Start with c = 0."""
        super().__post_init__()
        self._control: dict[str, Tensor] = {}

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move the shared model and c, which is kept in float64."""
        weights = self.server_learning_rate * self.client_weights(updates, self.weights)
        num_clients = max(updates.num_clients, len(updates.clients))
        new, old = (as_lazy(found.get(CONTROL, {})) for found in (updates.tensors, updates.start_tensors))
        for name in new:
            change = torch.zeros(new.shapes[name], dtype=torch.float64)
            for columns, block in new.blocks(name):
                change.view(-1)[columns] = (block.double() - old.block(name, columns).double()).sum(dim=0)
            self._control[name] = self._control.get(name, 0) + change / num_clients
        anchor = {name: control.float() for name, control in self._control.items()}
        return replace(self.move(updates, weights), anchors={CONTROL: anchor} if anchor else {})

    def state_dict(self) -> dict[str, Any]:
        """The server's c by parameter."""
        return dict(self._control)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore it."""
        self._control = dict(state)
