"""FedFV (Wang et al., IJCAI 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.fairness import FedFVSettings
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.fairness import away_from, kept_directions, of_length, without_conflicts
from fellrec.functional.mixing import gram_matrix
from fellrec.functional.stacks import Appended, Combinations, Differences


class FedFV(AggregationCallback, FedFVSettings):
    """The plain mean of updates that do not conflict, as long as the mean of the updates as they are.

    Then conflicts with updates of absent clients, of at most τ rounds ago, are projected away. The authors' program
    looks at clients that were last seen in the rounds ``t − τ + 1 … t``, so that its τ = 1 means this round's own; here
    it is ``t − τ … t − 1``, as in the paper. Updates are remembered only of rounds that some clients missed.
    """

    population = SharedModel
    needs_start_loss = True

    def __post_init__(self) -> None:
        """Start without updates of earlier rounds."""
        super().__post_init__()
        self._past: dict[str, dict[str, Tensor]] = {}
        self._rounds: dict[str, int] = {}

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Move the shared model, and remember the updates."""
        num_clients = len(updates.clients)
        for client in [c for c, seen in self._rounds.items() if seen < round_index - self.tau]:
            del self._past[client], self._rounds[client]
        absent = sorted(set(self._past) - set(map(str, updates.clients)), key=int)
        vectors = Appended(Differences(updates.end, updates.start), [self._past[client] for client in absent])
        gram = gram_matrix(vectors)
        mean = torch.zeros(len(gram), dtype=torch.float64)
        mean[:num_clients] = 1 / num_clients
        losses = self.received_losses(updates).tolist()
        order = sorted(range(num_clients), key=lambda row: (losses[row], updates.clients[row]))
        own = without_conflicts(gram[:num_clients, :num_clients], order, kept_directions(order, self.alpha))
        weights = torch.zeros_like(mean)
        weights[:num_clients] = own.mean(dim=0)
        seen = [self._rounds[client] for client in absent]
        groups = [[num_clients + n for n, last in enumerate(seen) if last == age] for age in sorted(set(seen))]
        weights = of_length(gram, away_from(gram, weights, groups), mean)
        result = self.moved_by(
            updates, Combinations(weights[None], vectors), {"update_weight": weights[:num_clients].clone()}
        )
        self._remember(updates, round_index)
        return result

    def _remember(self, updates: Updates, round_index: int) -> None:
        if not self.tau or len(updates.clients) == updates.num_clients:
            return
        moved = Differences(updates.end, updates.start)
        for row, client in enumerate(updates.clients):
            self._rounds[str(client)] = round_index
            self._past[str(client)] = {
                name: torch.cat([block[row].float() for _, block in moved.blocks(name)]).reshape(moved.shapes[name])
                for name in moved
            }

    def state_dict(self) -> dict[str, Any]:
        """Clients' last updates, and the rounds in which they were made."""
        return {"past": self._past, "rounds": self._rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._past, self._rounds = dict(state["past"]), dict(state["rounds"])
