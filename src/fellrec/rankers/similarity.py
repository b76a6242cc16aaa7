"""Scores of the retrieval family: similarity between the history's vector and every item's."""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.models.objectives.retrieval import RetrievalObjective
from fellrec.models.split import SplitModel


class SimilarityRanker:
    """Similarity (the objective's, cosine or dot product) with all item vectors, which are made once per adapter.

    Args:
        objective: The objective that the model was trained with; it holds the catalogue's text.
    """

    def __init__(self, objective: RetrievalObjective) -> None:
        self.objective = objective
        self._items_ID: Tensor | None = None

    @torch.no_grad()
    def refresh(self, model: SplitModel) -> None:
        """Make the item vectors with the adapter that is in the model now."""
        self._items_ID = self.objective.item_vectors(model)

    @torch.no_grad()
    def scores(self, model: SplitModel, histories: Tensor) -> Tensor:
        """Score all items for each history.

        Args:
            model: The backbone with a client's adapter in it.
            histories: ``[B, H]`` int64, oldest first, padded with -1 on the right.

        Returns:
            ``[B, I]`` float32, higher is better.
        """
        assert self._items_ID is not None, "refresh comes before scores"
        queries_BD = self.objective.queries(model, histories)
        with torch.autocast(queries_BD.device.type, enabled=False):  # rounded to bf16, many items would tie
            return queries_BD.float() @ self._items_ID.float().T
