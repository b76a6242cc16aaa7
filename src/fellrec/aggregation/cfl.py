"""Clustered federated learning (Sattler et al., 2020): groups of clients whose updates agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.personalised import CFLSettings
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.clusters import bipartition, is_divided, within_clusters
from fellrec.functional.mixing import cosine, gram_matrix


class CFL(AggregationCallback, CFLSettings):
    """FedAvg within clusters. A cluster is split in two when its mean update is small though its clients still move.

    A cluster of clients k is split if ``‖Σ p_k Δ_k‖ < eps1 · max ‖Δ_k‖`` and ``max ‖Δ_k‖ > eps2 · M``, M the largest
    norm of the first round. The paper's thresholds are absolute; these do not depend on the learning rate or on the
    size of the adapter.
    """

    def __post_init__(self) -> None:
        """Start with one cluster."""
        super().__post_init__()
        self._cluster_of: dict[int, int] = {}
        self._first_norm: float | None = None

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Split clusters from ``first_round`` on, then average within each; ``cluster`` is logged for each client."""
        gram = gram_matrix(updates.end, updates.start)
        largest = float(gram.diagonal().clamp_min(0).max().sqrt())
        if self._first_norm is None:
            self._first_norm = largest
        weights = self.client_weights(updates, self.weights)
        if round_index >= self.first_round:
            self._split(updates.clients, gram, weights)
        clusters = torch.tensor([self._cluster_of.get(row, 0) for row in updates.clients])
        result = self.combine(updates, within_clusters(clusters, weights))
        metrics = {"aggregation/clusters": float(len(clusters.unique()))}
        return replace(result, per_client={"cluster": clusters.double()}, metrics=metrics)

    def state_dict(self) -> dict[str, Any]:
        """The clusters by client row, and the largest norm of the first round."""
        clusters = {str(row): cluster for row, cluster in self._cluster_of.items()}
        return {"clusters": clusters, "first_norm": self._first_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._cluster_of = {int(row): cluster for row, cluster in state["clusters"].items()}
        self._first_norm = state["first_norm"]

    def _split(self, rows: tuple[int, ...], gram: Tensor, weights: Tensor) -> None:
        """Divide every cluster that must be divided, by the order of rows and not by that of the stack."""
        order = sorted(range(len(rows)), key=lambda position: rows[position])
        found = {position: self._cluster_of.get(rows[position], 0) for position in order}
        num_clusters = 1 + max(found.values())
        for cluster in sorted(set(found.values())):
            members = [position for position in order if found[position] == cluster]
            part = gram[members][:, members]
            least = self.eps2 * (self._first_norm or 0.0)
            if len(members) < 2 * self.min_clients or not is_divided(part, weights[members], self.eps1, least):
                continue
            second = bipartition(cosine(part), self.linkage)
            if self.min_clients <= int(second.sum()) <= len(members) - self.min_clients:
                for position, is_second in zip(members, second.tolist(), strict=True):
                    self._cluster_of[rows[position]] = num_clusters if is_second else cluster
                num_clusters += 1
