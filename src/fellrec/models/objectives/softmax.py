"""Which items a target is told from: all, all in chunks, or a sample of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fellrec.errors import ConfigError, unknown
from fellrec.functional.softmax import chunked_cross_entropy, draw_items, sampled_cross_entropy
from fellrec.models.streams import OF_LOSS, LayerStreams

PROPOSALS = ("uniform", "popularity")


class CatalogueSoftmax:
    """Cross-entropy of targets among the catalogue's items.

    Args:
        num_items: I.
        chunk_items: Logits of so many items are held at a time, ``None`` for all; the result is the same.
        num_negatives: Draw so many items a step instead of taking all, ``None`` for all.
        negatives: What they are drawn from: ``"uniform"``, or ``"popularity"``, by ``item_counts`` plus 1.
        item_counts: ``[I]``, how often each item was used; only for ``"popularity"``.

    Raises:
        ConfigError: For an unknown proposal, numbers out of range, or settings that exclude each other.
    """

    def __init__(
        self,
        num_items: int,
        chunk_items: int | None = None,
        num_negatives: int | None = None,
        negatives: str = "uniform",
        item_counts: Sequence[int] | None = None,
    ) -> None:
        if negatives not in PROPOSALS:
            raise ConfigError(unknown("objective.negatives", negatives, PROPOSALS))
        if chunk_items is not None and chunk_items < 1:
            raise ConfigError(f"objective.chunk_items={chunk_items} must be at least 1, or null for all at once")
        if num_negatives is not None and not 1 <= num_negatives < num_items:
            raise ConfigError(
                f"objective.num_negatives={num_negatives} must be at least 1 and below the {num_items} items of the "
                "catalogue, or null to take all"
            )
        if num_negatives is not None and chunk_items is not None:
            raise ConfigError(
                f"objective.chunk_items={chunk_items} is of the softmax over all items, "
                f"objective.num_negatives={num_negatives} takes a sample; one of them must be null"
            )
        self.chunk_items = chunk_items
        self.num_negatives = num_negatives
        if num_negatives is None:
            return
        weights_I = torch.ones(num_items, dtype=torch.float64)
        if negatives == "popularity":
            if item_counts is None:
                raise ConfigError("objective.negatives=popularity needs item_counts")
            weights_I += torch.as_tensor(item_counts, dtype=torch.float64)  # an item that is never drawn would bias
        self._cumulative_I = (weights_I / weights_I.sum()).cumsum(0)
        self._expected_I = num_negatives * weights_I / weights_I.sum()

    def loss(self, query_TD: Tensor, items_ID: Tensor, targets_T: Tensor, streams: LayerStreams) -> Tensor:
        """Sum over the targets of the negative log-likelihood.

        Args:
            query_TD: ``[T, D]``, divided by the temperature.
            items_ID: ``[I, D]``.
            targets_T: ``[T]`` int64.
            streams: Random numbers of the client that is being trained; a sample depends on the seed, the client, the
                round and the number of the batch in it.
        """
        if self.num_negatives is not None:
            streams.enter(OF_LOSS)
            sampled_S = draw_items(self._cumulative_I, self.num_negatives).to(targets_T.device)
            expected_I = self._expected_I.to(targets_T.device)
            return sampled_cross_entropy(query_TD, items_ID, targets_T, sampled_S, expected_I)
        if self.chunk_items is not None:
            return chunked_cross_entropy(query_TD, items_ID, targets_T, self.chunk_items)
        return F.cross_entropy(query_TD @ items_ID.T, targets_T, reduction="sum")
