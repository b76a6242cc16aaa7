"""HetLoRA (Cho et al., EMNLP 2024) and RBLA (Chen et al., 2024): means of factors of different ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.factors import factors
from fellrec.aggregation.settings.lora import HetLoRASettings, RankWeights, RBLASettings
from fellrec.federated.populations import SharedModel
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.lora import mean_by_rank, product_norms


class MeansOfRanks(AggregationCallback):
    """What both rules have in common: factors are padded with zeros, each client gets the part of its rank.

    A row of A, and column of B, that no client of the round has stays as it is at the server. The ranks that clients
    train are those of ``adapter.rank``; they are not pruned.
    """

    population = SharedModel
    weights: RankWeights
    only_present: bool

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Weighted means of all rows and columns; other parameters are averaged with the same weights."""
        weights = self.rank_weights(updates)
        adapter = updates.weighted_sums(weights)
        for layer, a, b in factors(updates):
            ranks = torch.full((len(a),), a.shape[1]) if updates.ranks is None else updates.ranks
            old_a, old_b = (updates.model.get(name) for name in (layer.a, layer.b))
            adapter[layer.a] = mean_by_rank(a, weights, ranks, self.only_present, old_a)
            columns = mean_by_rank(
                b.transpose(1, 2), weights, ranks, self.only_present, None if old_b is None else old_b.T
            )
            adapter[layer.b] = columns.T
        return self.shared(updates, adapter, {"update_weight": weights})

    def rank_weights(self, updates: Updates) -> Tensor:
        """The clients' weights, ``[N]`` float64 with sum 1; equal where all products are 0."""
        if self.weights != "norms":
            return self.client_weights(updates, self.weights)
        squares = torch.zeros(len(updates.clients), dtype=torch.float64)
        for layer, a, b in factors(updates):
            squares += (layer.scale * product_norms(a, b)).square()
        norms = squares.sqrt()
        return norms / norms.sum() if norms.any() else self.client_weights(updates, "equal")


class HetLoRA(MeansOfRanks, HetLoRASettings):
    """Means in which a client without a row counts as one with zeros, by default weighted by ``‖B_k A_k‖``."""

    only_present = False


class RBLA(MeansOfRanks, RBLASettings):
    """Means of each row over the clients that have it."""

    only_present = True
