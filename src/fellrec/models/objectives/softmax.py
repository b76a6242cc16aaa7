"""Softmax over the items of the catalogue: full, in chunks, or sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fellrec.errors import ConfigError, unknown
from fellrec.functional.softmax import chunked_cross_entropy, draw_items, sampled_cross_entropy
from fellrec.models.streams import OF_LOSS, LayerStreams

PROPOSALS = ("uniform", "popularity")


class CatalogueSoftmax:
    """Cross-entropy of targets over the items of the catalogue.

    Args:
        num_items: I.
        chunk_items: Number of items whose logits are in memory at the same time, ``None`` for all. It does not change
            the result.
        num_negatives: Number of sampled items per step; ``None`` for the full softmax.
        negatives: Proposal distribution of the sample: ``"uniform"``, or ``"popularity"``, by ``item_counts`` plus 1.
        item_counts: ``[I]`` number of interactions of each item; only for ``"popularity"``.

    Raises:
        ConfigError: For an unknown proposal, numbers out of range, or conflicting settings.
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
                "catalogue, or null for all items"
            )
        if num_negatives is not None and chunk_items is not None:
            raise ConfigError(
                f"objective.chunk_items={chunk_items} needs the full softmax, "
                f"objective.num_negatives={num_negatives} samples it; one of them must be null"
            )
        self.chunk_items = chunk_items
        self.num_negatives = num_negatives
        if num_negatives is None:
            return
        weights_I = torch.ones(num_items, dtype=torch.float64)
        if negatives == "popularity":
            if item_counts is None:
                raise ConfigError("objective.negatives=popularity needs item_counts")
            weights_I += torch.as_tensor(item_counts, dtype=torch.float64)  # + 1: items with probability 0 would bias
        self._cumulative_I = (weights_I / weights_I.sum()).cumsum(0)
        self._expected_I = num_negatives * weights_I / weights_I.sum()

    def draw(self, targets_T: Tensor, streams: LayerStreams) -> dict[str, Tensor]:
        """Draw the sample of one batch.

        Args:
            targets_T: ``[T]`` int64.
            streams: Random streams of the client in training. A sample depends on the seed, the client, the round and
                the index of the batch in the round.

        Returns:
            The distinct items of targets and sample ``items [N]``, N at most T + S, and the positions in it of the
            targets, ``target_places [T]``, and of the sample, ``sample_places [S]``; all int64. Empty for the full
            softmax.
        """
        if self.num_negatives is None:
            return {}
        streams.enter(OF_LOSS)
        sampled_S = draw_items(self._cumulative_I, self.num_negatives).to(targets_T.device)
        items_N, places = torch.cat([targets_T, sampled_S]).unique(return_inverse=True)
        target_places, sample_places = places.split([len(targets_T), len(sampled_S)])
        return {"items": items_N, "target_places": target_places, "sample_places": sample_places}

    def loss(self, query_TD: Tensor, items_ND: Tensor, targets_T: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        """Sum over the targets of the negative log-likelihood.

        Args:
            query_TD: ``[T, D]``, divided by the temperature.
            items_ND: ``[N, D]`` vectors of the drawn items, or of all items.
            targets_T: ``[T]`` int64.
            drawn: Output of `draw`.
        """
        if self.num_negatives is not None:
            expected_N = self._expected_I.to(targets_T.device)[drawn["items"]]
            return sampled_cross_entropy(query_TD, items_ND, drawn["target_places"], drawn["sample_places"], expected_N)
        if self.chunk_items is not None:
            return chunked_cross_entropy(query_TD, items_ND, targets_T, self.chunk_items)
        return F.cross_entropy(query_TD @ items_ND.T, targets_T, reduction="sum")
