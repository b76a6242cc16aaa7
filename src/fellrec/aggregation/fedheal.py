"""FedHEAL (Chen et al., CVPR 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.fairness import FedHEALSettings
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.fairness import consistent
from fellrec.functional.stacks import Differences, LazyStack, squared_norms


class FedHEAL(AggregationCallback, FedHEALSettings):
    """The mean of masked updates, per entry over the clients whose mask has it, with weights by their lengths.

    A client's mask has the entries that it moved in this direction in more than a share θ of its earlier rounds; in its
    first round, all of them. Its weight grows by ``δ_k ← (1 − β) δ_k + β d_k / Σ d``, from ``1 / N`` on, with ``d_k``
    the sum over parameters of the norms of its masked update. An entry that no mask has is not moved.

    The authors' program counts rounds that a client missed as if they had gone like its earlier ones; here each
    client's own rounds count, which is the same if no client is absent.
    """

    population = SharedModel

    def __post_init__(self) -> None:
        """Start without a history."""
        super().__post_init__()
        self._share_up: dict[str, dict[str, Tensor]] = {}
        self._num_rounds: dict[str, int] = {}
        self._growth: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move the shared model, and add the round to the clients' histories."""
        clients = [str(client) for client in updates.clients]
        moved = Differences(updates.end, updates.start)
        masked = Masked(moved, [self._share_up.get(client, {}) for client in clients], self.threshold)
        distances = torch.zeros(len(clients), dtype=torch.float64)
        for squares in squared_norms(masked).values():
            distances += squares.sqrt()
        weights = self._next_weights(clients, distances)
        result = self.moved_by(updates, MeanOfMasked(masked, weights), {"client_weight": weights / weights.sum()})
        self._remember(clients, moved)
        return result

    def _next_weights(self, clients: Sequence[str], distances: Tensor) -> Tensor:
        """The clients' weights ``[N]`` after this round; where no client moved, no distance is added."""
        shares = distances / distances.sum() if float(distances.sum()) > 0 else torch.zeros_like(distances)
        for client, share in zip(clients, shares.tolist()):
            self._growth[client] = (1 - self.beta) * self._growth.get(client, 0.0) + self.beta * share
            self._weights[client] = self._weights.get(client, 1 / len(clients)) + self._growth[client]
        return torch.tensor([self._weights[client] for client in clients], dtype=torch.float64)

    def _remember(self, clients: Sequence[str], moved: LazyStack) -> None:
        """Add the round's directions to the running means."""
        before = [self._num_rounds.get(client, 0) for client in clients]
        rows: list[dict[str, Tensor]] = [{} for _ in clients]
        for name, shape in moved.shapes.items():
            ups = torch.cat([(block >= 0).float() for _, block in moved.blocks(name)], dim=1)
            for row, client in enumerate(clients):
                last = self._share_up.get(client, {}).get(name)
                up = ups[row].reshape(shape)
                rows[row][name] = up if last is None else last + (up - last) / (before[row] + 1)
        for row, client in enumerate(clients):
            self._share_up[client] = self._share_up.get(client, {}) | rows[row]
            self._num_rounds[client] = before[row] + 1

    def state_dict(self) -> dict[str, Any]:
        """The clients' histories."""
        numbers = {"num_rounds": self._num_rounds, "growth": self._growth, "weights": self._weights}
        return {"share_up": self._share_up, **numbers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._share_up, self._num_rounds = dict(state["share_up"]), dict(state["num_rounds"])
        self._growth, self._weights = dict(state["growth"]), dict(state["weights"])


class Masked(LazyStack):
    """Updates whose entries are 0 where they do not keep the client's usual direction.

    Args:
        moved: The updates.
        share_up: For each client, the share of its earlier updates that are at least 0, by parameter; without a
            parameter, all of its entries count.
        threshold: θ.
    """

    def __init__(self, moved: LazyStack, share_up: Sequence[Mapping[str, Tensor]], threshold: float) -> None:
        super().__init__(moved.shapes, moved.num_rows)
        self._moved, self._share_up, self._threshold = moved, share_up, threshold

    def with_mask(self, name: str, columns: slice) -> tuple[Tensor, Tensor]:
        """The masked updates and the mask, both ``[N, columns]``."""
        block = self._moved.block(name, columns)
        masks = [
            consistent(row >= 0, share[name].reshape(-1)[columns], self._threshold)
            if name in share
            else torch.ones(len(row), dtype=torch.bool)
            for row, share in zip(block, self._share_up)
        ]
        mask = torch.stack(masks)
        return block * mask, mask

    def block(self, name: str, columns: slice) -> Tensor:
        """See ``LazyStack``."""
        return self.with_mask(name, columns)[0]


class MeanOfMasked(LazyStack):
    """One row: each entry's weighted mean over the clients whose mask has it; 0 if none has.

    Args:
        masked: The updates.
        weights: ``[N]``, above 0.
    """

    def __init__(self, masked: Masked, weights: Tensor) -> None:
        super().__init__(masked.shapes, 1)
        self._masked, self._weights = masked, weights

    def block(self, name: str, columns: slice) -> Tensor:
        """See ``LazyStack``."""
        values, mask = self._masked.with_mask(name, columns)
        total = self._weights @ mask.double()
        return torch.where(total > 0, (self._weights @ values) / total, 0)[None]
