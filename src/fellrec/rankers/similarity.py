"""Ranker of the retrieval objective: similarity between the history vector and all item vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.models.objectives.retrieval import RetrievalObjective
from fellrec.models.split import SplitModel


class SimilarityRanker:
    """Cosine similarity or dot product with all item vectors, which are computed once per adapter.

    Args:
        objective: The objective of the training, for its vectors.
    """

    def __init__(self, objective: RetrievalObjective) -> None:
        self.objective = objective
        self._items_ID: Tensor | None = None

    @torch.no_grad()
    def refresh(self, model: SplitModel) -> None:
        """Compute the item vectors with the model's current adapter."""
        self._items_ID = self.objective.kept_item_vectors(model)

    @torch.no_grad()
    def scores(self, model: SplitModel, histories: Tensor) -> Tensor:
        """Score all items for each history.

        Args:
            model: The backbone with a client's adapter.
            histories: ``[B, H]`` int64, oldest first, padded with -1 on the right.

        Returns:
            ``[B, I]`` float32, higher is better.
        """
        assert self._items_ID is not None, "call refresh before scores"
        queries_BD = self.objective.queries(model, histories)
        with torch.autocast(queries_BD.device.type, enabled=False):  # in bfloat16 many items would be tied
            return queries_BD.float() @ self._items_ID.float().T
