"""Full ranking: ranks of the held-out targets among all items, and ranking metrics.

Users and targets are ragged: target ``t`` belongs to row ``target_rows[t]`` and is item ``target_items[t]``.
Shape letters: B rows (users), I items, T targets, M masked pairs, P (row, title) pairs, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fellrec.errors import ConfigError, DataError, TrainingError

METRICS = ("ndcg", "recall", "hr", "mrr")
"""Metric names; with a cutoff they become ``ndcg_at_10`` and so on."""

MAX_COMPARISONS = 1 << 24
"""Maximum number of (target, item) comparisons in memory at the same time."""


def check_cutoffs(cutoffs: Sequence[int], num_items: int) -> tuple[int, ...]:
    """Validate cutoffs.

    Args:
        cutoffs: The cutoffs K of Recall@K, NDCG@K, ….
        num_items: Number of items in the catalogue.

    Returns:
        The distinct cutoffs, ascending.

    Raises:
        ConfigError: If ``cutoffs`` is empty, or one is not an integer from 1 to ``num_items``.

    Example:
        >>> check_cutoffs([10, 5], num_items=100)
        (5, 10)
    """
    allowed = f"allowed are integers from 1 to {num_items}, the number of items"
    if not cutoffs:
        raise ConfigError(f"cutoffs is empty; {allowed}")
    for cutoff in cutoffs:
        if isinstance(cutoff, bool) or not isinstance(cutoff, int) or not 1 <= cutoff <= num_items:
            raise ConfigError(f"invalid cutoff {cutoff!r}; {allowed}")
    return tuple(sorted(set(cutoffs)))


def target_ranks(
    scores: Tensor,
    target_rows: Tensor,
    target_items: Tensor,
    masked_rows: Tensor,
    masked_items: Tensor,
    title_groups: Tensor | None = None,
    candidates: Tensor | None = None,
) -> Tensor:
    """Rank of every target among all items that are not masked (METHOD section 5).

    - A target is never masked.
    - Ties are pessimistic: items tied with a target precede it. Tied targets of one row get distinct ranks.
    - Several items with the same title: a target takes the best rank among the unmasked ones. If a row has several
      targets with the same title, the first takes the best of these ranks, the next the second best, and so on.

    The ranks in one row are therefore distinct.

    Args:
        scores: ``[B, I]`` floats, higher is better; not changed.
        target_rows: ``[T]`` int64 row of each target.
        target_items: ``[T]`` int64 item of each target.
        masked_rows: ``[M]`` int64 row of each pair to leave out, such as the user's earlier items.
        masked_items: ``[M]`` int64 item of each pair to leave out.
        title_groups: ``[I]`` int64, equal for items with the same title; ``None`` if all titles differ.
        candidates: ``[B, I]`` bool, items that are ranked beside the targets and the unmasked items with their titles,
            so that no rank is above that without candidates; ``None`` for all unmasked items.

    Returns:
        ``[T]`` int64 ranks from 0.

    Raises:
        TrainingError: If a score is NaN.
        DataError: If a row has the same target twice.

    Example:
        >>> scores = torch.tensor([[0.9, 0.5, 0.5, 0.1]])
        >>> none = torch.tensor([], dtype=torch.long)
        >>> target_ranks(scores, torch.tensor([0]), torch.tensor([1]), none, none)  # tied with item 2
        tensor([2])
        >>> target_ranks(scores, torch.tensor([0]), torch.tensor([1]), torch.tensor([0, 0]), torch.tensor([0, 1]))
        tensor([1])
    """
    _check_scores_and_targets(scores, target_rows, target_items)
    unmasked = torch.ones_like(scores, dtype=torch.bool)
    unmasked[masked_rows, masked_items] = False
    unmasked[target_rows, target_items] = True
    allowed = unmasked if candidates is None else candidates & unmasked
    allowed[target_rows, target_items] = True
    if title_groups is None:
        representatives, shares_title = target_items, torch.zeros_like(allowed)
        shares_title[target_rows, target_items] = True
    else:
        members = title_members(scores, unmasked, target_rows, target_items, title_groups)
        allowed[members.rows, members.items] = True
        representatives, shares_title = _title_representatives(members), members.shares_title
    return _ranks_in_order(scores, allowed, shares_title, target_rows, representatives)


def ranking_metrics(ranks: Tensor, rows: Tensor, num_rows: int, cutoffs: Sequence[int]) -> dict[str, Tensor]:
    """NDCG, recall, hit rate and reciprocal rank of each row at each cutoff, for one or several targets per row.

    With ``n`` targets in a row: NDCG is normalised by the gain of ``min(n, K)`` targets at the top; recall is divided
    by ``n``; the hit rate is 1 if any target is among the first K; the reciprocal rank is that of the best target, or
    0 if it is not among the first K.

    Args:
        ranks: ``[T]`` int64 ranks from 0, distinct within a row.
        rows: ``[T]`` int64 row of each rank.
        num_rows: Number of rows B.
        cutoffs: The cutoffs K.

    Returns:
        ``{"ndcg_at_K", "recall_at_K", "hr_at_K", "mrr_at_K"}`` for each K, each ``[B]`` float64 on the CPU, where the
        order of summation is deterministic. NaN for rows without targets.

    Example:
        >>> metrics = ranking_metrics(torch.tensor([0, 4, 1]), torch.tensor([0, 0, 1]), num_rows=2, cutoffs=[2])
        >>> {name: values.numpy().round(3).tolist() for name, values in metrics.items()}
        {'ndcg_at_2': [0.613, 0.631], 'recall_at_2': [0.5, 1.0], 'hr_at_2': [1.0, 1.0], 'mrr_at_2': [1.0, 0.5]}
    """
    ranks, rows = ranks.cpu(), rows.cpu()
    num_targets = torch.bincount(rows, minlength=num_rows)
    discounts = 1 / torch.log2(ranks.double() + 2)
    best = torch.full((num_rows,), torch.iinfo(torch.int64).max).scatter_reduce(0, rows, ranks, "amin")
    empty = num_targets == 0
    metrics = {}
    for cutoff in cutoffs:
        inside = ranks < cutoff
        gain = torch.bincount(rows, weights=discounts * inside, minlength=num_rows)
        hits = torch.bincount(rows, weights=inside.double(), minlength=num_rows)
        hit = (best < cutoff).double()
        values = {
            "ndcg": gain / _ideal_gain(cutoff)[num_targets.clamp_max(cutoff)],
            "recall": hits / num_targets,
            "hr": hit,
            "mrr": hit / (best.double() + 1),
        }
        for name in METRICS:
            metrics[f"{name}_at_{cutoff}"] = values[name].masked_fill(empty, torch.nan)
    return metrics


def _check_scores_and_targets(scores: Tensor, target_rows: Tensor, target_items: Tensor) -> None:
    nan_rows = scores.isnan().any(dim=1)
    if nan_rows.any():
        raise TrainingError(
            f"scores are NaN in {int(nan_rows.sum())} of {len(scores)} rows, first in row {int(nan_rows.nonzero()[0])}"
            "; the trained parameters are too large or not finite; lower trainer.learning_rate"
        )
    pairs = (target_rows * scores.shape[1] + target_items).sort().values
    twice = (pairs[1:] == pairs[:-1]).nonzero()
    if len(twice):
        row, item = divmod(int(pairs[twice[0]]), scores.shape[1])
        raise DataError(f"{len(twice)} targets are duplicates; first: item {item} in row {row}")


class TitleMembers(NamedTuple):
    """Items with the title of a target in their row, sorted by (row, title) pair, then by score, then by index.

    Attributes:
        pairs: ``[K]`` int64 index of the (row, title) pair, ascending.
        rows: ``[K]`` int64 row.
        items: ``[K]`` int64 item.
        pair_of_target: ``[T]`` int64 pair of each target.
        shares_title: ``[B, I]`` bool, items with the title of a target, including items that are not ranked.
    """

    pairs: Tensor
    rows: Tensor
    items: Tensor
    pair_of_target: Tensor
    shares_title: Tensor


def title_members(
    scores: Tensor, allowed: Tensor, target_rows: Tensor, target_items: Tensor, title_groups: Tensor
) -> TitleMembers:
    """Find the items with the title of a target.

    Args:
        scores: ``[B, I]``.
        allowed: ``[B, I]`` bool, items that are ranked.
        target_rows: ``[T]`` int64 row of each target.
        target_items: ``[T]`` int64 item of each target.
        title_groups: ``[I]`` int64, equal for items with the same title.

    Example:
        >>> scores, row = torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([0])
        >>> groups = torch.tensor([0, 1, 0])  # items 0 and 2 have the same title
        >>> title_members(scores, torch.ones(1, 3).bool(), row, torch.tensor([0]), groups).items
        tensor([2, 0])
    """
    num_groups = int(title_groups.max()) + 1
    pairs_T = target_rows * num_groups + title_groups[target_items]
    pairs_P, pair_of_target_T = pairs_T.unique(return_inverse=True)
    members = title_groups.argsort(stable=True)
    sizes = torch.bincount(title_groups, minlength=num_groups)
    firsts = _starts(sizes)

    group_P = pairs_P % num_groups
    pair_K = torch.repeat_interleave(sizes[group_P])
    item_K = members[firsts[group_P][pair_K] + position_within(pair_K)]
    row_K = (pairs_P // num_groups)[pair_K]
    shares_title = torch.zeros_like(allowed)
    shares_title[row_K, item_K] = True

    kept = allowed[row_K, item_K]
    pair_K, item_K, row_K = pair_K[kept], item_K[kept], row_K[kept]
    order = scores[row_K, item_K].argsort(descending=True, stable=True)  # by pair, then score, then item
    order = order[pair_K[order].argsort(stable=True)]
    return TitleMembers(pair_K[order], row_K[order], item_K[order], pair_of_target_T, shares_title)


def _title_representatives(members: TitleMembers) -> Tensor:
    """``[T]`` int64, item whose rank each target takes."""
    first_candidate_P = _starts(torch.bincount(members.pairs))
    return members.items[first_candidate_P[members.pair_of_target] + position_within(members.pair_of_target)]


def _ranks_in_order(scores: Tensor, allowed: Tensor, shares_title: Tensor, rows: Tensor, items: Tensor) -> Tensor:
    """``[T]`` rank of ``items[t]`` in row ``rows[t]``, by score, then items without a target's title, then index."""
    index_I = torch.arange(scores.shape[1], device=scores.device)
    ranks = torch.empty_like(rows)
    block = max(1, MAX_COMPARISONS // scores.shape[1])
    for start in range(0, len(rows), block):
        row, item = rows[start : start + block], items[start : start + block]
        own = scores[row, item][:, None]
        others = scores[row]
        tied_before = (others == own) & (~shares_title[row] | (index_I < item[:, None]))
        ranks[start : start + block] = (((others > own) | tied_before) & allowed[row]).sum(dim=1)
    return ranks


def _ideal_gain(cutoff: int) -> Tensor:
    """``[cutoff + 1]`` float64 discounted gain of 0, 1, … targets at the top."""
    discounts = 1 / torch.log2(torch.arange(cutoff, dtype=torch.float64) + 2)
    return torch.cat([torch.zeros(1, dtype=torch.float64), discounts.cumsum(0)])


def position_within(groups: Tensor) -> Tensor:
    """Number of earlier entries with the same value, for each entry of ``groups [n]`` int64."""
    order = groups.argsort(stable=True)
    starts = _starts(torch.bincount(groups))
    position = torch.empty_like(groups)
    position[order] = torch.arange(len(groups), device=groups.device) - starts[groups[order]]
    return position


def _starts(sizes: Tensor) -> Tensor:
    """Start offset of each group in a concatenation of groups of the given sizes."""
    return sizes.cumsum(0) - sizes
