"""torchmetrics classes for the ranking metrics of METHOD section 5, each a mean over users at one cutoff."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from fellrec.functional.ranking import check_cutoffs, ranking_metrics, target_ranks


class RankingMetric(Metric):
    """Base class: keeps the ranks of all targets, from which every metric at every cutoff is computed.

    All subclasses keep the same states, so that in a ``MetricCollection`` they form one compute group and the ranks
    are computed once.

    Args:
        cutoff: The K, at least 1 and at most the number of items.
        **kwargs: As for ``torchmetrics.Metric``.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    metric_name = ""

    ranks: list[Tensor]
    num_targets: list[Tensor]

    def __init__(self, cutoff: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cutoff = cutoff
        self.add_state("ranks", default=[], dist_reduce_fx="cat")
        self.add_state("num_targets", default=[], dist_reduce_fx="cat")

    def update(
        self,
        scores: Tensor,
        target_rows: Tensor,
        target_items: Tensor,
        masked_rows: Tensor,
        masked_items: Tensor,
        title_groups: Tensor | None = None,
    ) -> None:
        """Rank the targets of a batch of users.

        Args:
            scores: ``[B, I]`` floats, higher is better.
            target_rows: ``[T]`` int64 row of each target; a row without targets does not count.
            target_items: ``[T]`` int64 item of each target.
            masked_rows: ``[M]`` int64 row of each pair to leave out.
            masked_items: ``[M]`` int64 item of each pair to leave out.
            title_groups: ``[I]`` int64, items with one title share a number.

        Raises:
            ConfigError: If the cutoff is not an integer from 1 to ``I``.
            TrainingError: If a score is NaN.
            DataError: If a row has the same target twice.
        """
        check_cutoffs((self.cutoff,), scores.shape[1])
        ranks = target_ranks(scores, target_rows, target_items, masked_rows, masked_items, title_groups)
        self.ranks.append(ranks[target_rows.argsort(stable=True)])
        self.num_targets.append(torch.bincount(target_rows, minlength=len(scores)))

    def compute(self) -> Tensor:
        """Mean over all users with targets, float64 scalar; NaN without such users."""
        ranks, num_targets = dim_zero_cat(self.ranks), dim_zero_cat(self.num_targets)
        rows = torch.repeat_interleave(num_targets)
        name = f"{self.metric_name}_at_{self.cutoff}"
        return ranking_metrics(ranks, rows, len(num_targets), (self.cutoff,))[name].nanmean()


class NDCG(RankingMetric):
    """Normalised discounted cumulative gain at K; the ideal ranking has ``min(targets, K)`` targets at the top."""

    metric_name = "ndcg"


class Recall(RankingMetric):
    """Fraction of a user's targets that are among the first K items."""

    metric_name = "recall"


class HitRate(RankingMetric):
    """Fraction of users with at least one target among the first K items."""

    metric_name = "hr"


class MRR(RankingMetric):
    """Reciprocal rank of a user's best target, 0 beyond K."""

    metric_name = "mrr"
