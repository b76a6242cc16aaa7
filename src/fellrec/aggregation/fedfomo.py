"""FedFomo (Zhang et al., ICLR 2021): clients move towards the models of others that are better on their own data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.personalised import FedFomoSettings
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.attention import first_order_weights
from fellrec.functional.stacks import RowStack
from fellrec.state.tensor_store import StoredTensors


class FedFomo(AggregationCallback, FedFomoSettings):
    """Before it trains, client k moves by ``Σ_j a_kj (w_j − w_k)``.

    ``a_kj = max(0, (L_k(w_k) − L_k(w_j)) / ‖w_j − w_k‖)``, divided by their sum if it is not 0; L_k is the loss on rows
    of the client that it does not train on. It asks for the models of the M others with the largest sum of ``a_kj`` so
    far; of equal ones, those that it asked for least often, then the next by number.
    """

    keeps_trained = True

    def __post_init__(self) -> None:
        """Start without affinities."""
        super().__post_init__()
        self._affinity: dict[int, dict[int, float]] = {}
        self._asked: dict[int, dict[int, int]] = {}
        self._senders: dict[int, list[int]] = {}

    def candidates(self, row: int, adapters: Sequence[StoredTensors], round_index: int) -> Sequence[StoredTensors]:
        """The client's own adapter, then those of the others that it asks for; nothing in the first round."""
        others = [(row + step) % len(adapters) for step in range(1, len(adapters))]
        if round_index == 0 or not others:
            return ()
        affinity, asked = self._affinity.get(row, {}), self._asked.setdefault(row, {})
        ordered = sorted(others, key=lambda other: (-affinity.get(other, 0.0), asked.get(other, 0)))
        self._senders[row] = ordered[: self.num_models]
        for other in self._senders[row]:
            asked[other] = asked.get(other, 0) + 1
        return [adapters[row], *(adapters[other] for other in self._senders[row])]

    def start(self, row: int, candidates: Sequence[StoredTensors], losses: Tensor) -> Mapping[str, Tensor]:
        """The client's adapter, moved towards better ones."""
        shapes = {name: tensor.shape for name, tensor in candidates[0].tensors().items()}
        stack = RowStack(shapes, [candidate.tensors for candidate in candidates])
        squares = torch.zeros(len(candidates), dtype=torch.float64)
        for name in stack:
            for _, block in stack.blocks(name):
                squares += (block.double() - block[0].double()).square().sum(dim=1)
        weights = first_order_weights(losses, squares.sqrt())
        affinity = self._affinity.setdefault(row, {})
        for other, weight in zip(self._senders[row], weights[1:].tolist(), strict=True):
            affinity[other] = affinity.get(other, 0.0) + weight
        return {
            name: torch.cat([(weights @ block.double()).to(block.dtype) for _, block in stack.blocks(name)]).reshape(
                shapes[name]
            )
            for name in stack
        }

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Clients keep what they trained, which others can ask for in the next round."""
        return Aggregated({})

    def state_dict(self) -> dict[str, Any]:
        """Affinities and numbers of requests, by client and sender."""
        return {"affinity": _with_texts(self._affinity), "asked": _with_texts(self._asked)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._affinity, self._asked = _with_numbers(state["affinity"]), _with_numbers(state["asked"])


def _with_texts(nested: Mapping[int, Mapping[int, Any]]) -> dict[str, dict[str, Any]]:
    return {str(row): {str(other): value for other, value in found.items()} for row, found in nested.items()}


def _with_numbers(nested: Mapping[str, Mapping[str, Any]]) -> dict[int, dict[int, Any]]:
    return {int(row): {int(other): value for other, value in found.items()} for row, found in nested.items()}
