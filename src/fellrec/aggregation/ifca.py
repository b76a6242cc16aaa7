"""IFCA (Ghosh et al., NeurIPS 2020): each client trains the cluster's model that fits its data best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.personalised import IFCASettings
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional.clusters import perturbed, within_clusters
from fellrec.functional.stacks import as_lazy
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import Adapter


class IFCA(AggregationCallback, IFCASettings):
    """The server has M models. A client takes that with the lowest training loss and trains it.

    A model becomes the mean of what its clients return; one without clients stays as it is. Clients that miss a round
    keep the model that they got last until they choose again.
    """

    def __post_init__(self) -> None:
        """Start without models."""
        super().__post_init__()
        self._models: list[Adapter] = []
        self._stored: list[StoredTensors] = []
        self._cluster_of: dict[int, int] = {}

    def begin(self, initial: Mapping[str, Tensor]) -> None:
        """The first model is the initial adapter, the others are it with noise."""
        generator = torch.Generator().manual_seed(self.seed)
        others = [perturbed(initial, self.noise, generator) for _ in range(self.num_clusters - 1)]
        self._take([dict(initial), *others])

    def candidates(self, row: int, adapters: Sequence[StoredTensors], round_index: int) -> Sequence[StoredTensors]:
        """All M models."""
        return self._stored

    def start(self, row: int, candidates: Sequence[StoredTensors], losses: Tensor) -> Mapping[str, Tensor]:
        """The model with the lowest loss, the first of several; one whose loss is not a number is not taken."""
        self._cluster_of[row] = int(losses.nan_to_num(nan=torch.inf).argmin())
        return candidates[self._cluster_of[row]].tensors()

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """The mean of each cluster; ``cluster`` is logged for each client."""
        clusters = torch.tensor([self._cluster_of.get(row, 0) for row in updates.clients])
        matrix = within_clusters(clusters, self.client_weights(updates, self.weights))
        result = self.combine(updates, matrix, per_client={"cluster": clusters.double()})
        mixed = as_lazy(result.adapters)
        for cluster in clusters.unique().tolist():
            first = int((clusters == cluster).nonzero()[0])
            for name in mixed:
                self._models[cluster][name] = mixed[name][first].clone()
        self._take(self._models)
        return result

    def state_dict(self) -> dict[str, Any]:
        """The models, and the clusters by client row."""
        models = {str(number): model for number, model in enumerate(self._models)}
        return {"models": models, "clusters": {str(row): cluster for row, cluster in self._cluster_of.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self._take([dict(state["models"][str(number)]) for number in range(len(state["models"]))])
        self._cluster_of = {int(row): cluster for row, cluster in state["clusters"].items()}

    def _take(self, models: list[Adapter]) -> None:
        self._models = models
        self._stored = [StoredTensors(dict(model)) for model in models]
