"""Full ranking: the rank of each held-out target among all items, and the metrics that follow from ranks.

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

_CELLS = 1 << 24
"""Comparisons of a target with an item that are held in memory at once."""


def check_cutoffs(cutoffs: Sequence[int], num_items: int) -> tuple[int, ...]:
    """Check cutoffs before anything expensive starts.

    Args:
        cutoffs: The K of Recall@K, NDCG@K, ….
        num_items: Items in the catalogue.

    Returns:
        The cutoffs, ascending, each once.

    Raises:
        ConfigError: If there is none, or one is not an integer from 1 to ``num_items``.

    Example:
        >>> check_cutoffs([10, 5], num_items=100)
        (5, 10)
    """
    allowed = f"allowed are integers from 1 to {num_items}, the number of items"
    if not cutoffs:
        raise ConfigError(f"cutoffs is empty; {allowed}")
    for cutoff in cutoffs:
        if isinstance(cutoff, bool) or not isinstance(cutoff, int) or not 1 <= cutoff <= num_items:
            raise ConfigError(f"cutoff {cutoff!r} cannot be used; {allowed}")
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
    - Ties are pessimistic: items tied with a target stand before it. Targets of one row that are tied with each
      other get distinct ranks, so they are not all counted against each other.
    - Distinct items with one title: the best rank among those that are not masked counts. If a row has several
      targets with one title, the first takes the best of these ranks, the next the second best, and so on.

    Ranks of one row are therefore always distinct.

    Args:
        scores: ``[B, I]`` floats, higher is better; not changed.
        target_rows: ``[T]`` int64 row of each target.
        target_items: ``[T]`` int64 item of each target.
        masked_rows: ``[M]`` int64 row of each pair to leave out, such as the user's earlier items.
        masked_items: ``[M]`` int64 item of each pair to leave out.
        title_groups: ``[I]`` int64, items with one title share a number; ``None``: all titles differ.
        candidates: ``[B, I]`` bool, the items beside the targets that are ranked; ``None``: all that are not masked.

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
    allowed = torch.ones_like(scores, dtype=torch.bool) if candidates is None else candidates.clone()
    allowed[masked_rows, masked_items] = False
    allowed[target_rows, target_items] = True
    if title_groups is None:
        representatives, shares_title = target_items, torch.zeros_like(allowed)
        shares_title[target_rows, target_items] = True
    else:
        members = title_members(scores, allowed, target_rows, target_items, title_groups)
        representatives, shares_title = _title_representatives(members), members.shares_title
    return _ranks_in_order(scores, allowed, shares_title, target_rows, representatives)


def ranking_metrics(ranks: Tensor, rows: Tensor, num_rows: int, cutoffs: Sequence[int]) -> dict[str, Tensor]:
    """NDCG, recall, hit rate and reciprocal rank of each row at each cutoff, for one or several targets a row.

    With ``n`` targets in a row: NDCG divides by the gain of ``min(n, K)`` targets at the top; recall divides by ``n``;
    hit rate is 1 if any target is among the first K; the reciprocal rank is that of the best target, 0 beyond K.

    Args:
        ranks: ``[T]`` int64 ranks from 0, distinct within a row.
        rows: ``[T]`` int64 row of each rank.
        num_rows: Number of rows B.
        cutoffs: The K.

    Returns:
        ``{"ndcg_at_K", "recall_at_K", "hr_at_K", "mrr_at_K"}`` for each K, each ``[B]`` float64 on the CPU (where the
        order of additions, and with it the result, is fixed). A row without targets is NaN.

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
        )
    pairs = (target_rows * scores.shape[1] + target_items).sort().values
    twice = (pairs[1:] == pairs[:-1]).nonzero()
    if len(twice):
        row, item = divmod(int(pairs[twice[0]]), scores.shape[1])
        raise DataError(f"{len(twice)} targets stand twice in their row, first item {item} in row {row}")


class TitleMembers(NamedTuple):
    """The items that share a title with a target of their row; a (row, title) pair's stand together, best first.

    Attributes:
        pairs: ``[K]`` int64 pair of each, ascending.
        rows: ``[K]`` int64 row of each.
        items: ``[K]`` int64 item of each; by score, then by index.
        pair_of_target: ``[T]`` int64 pair of each target.
        shares_title: ``[B, I]`` bool: the same items, and those that are not ranked.
    """

    pairs: Tensor
    rows: Tensor
    items: Tensor
    pair_of_target: Tensor
    shares_title: Tensor


def title_members(
    scores: Tensor, allowed: Tensor, target_rows: Tensor, target_items: Tensor, title_groups: Tensor
) -> TitleMembers:
    """Find the items that compete for the places of a title.

    Args:
        scores: ``[B, I]``.
        allowed: ``[B, I]`` bool: items that are ranked.
        target_rows: ``[T]`` int64 row of each target.
        target_items: ``[T]`` int64 item of each target.
        title_groups: ``[I]`` int64, items with one title share a number.

    Example:
        >>> scores, row = torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([0])
        >>> groups = torch.tensor([0, 1, 0])  # items 0 and 2 share a title
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
    item_K = members[firsts[group_P][pair_K] + _position_within(pair_K)]
    row_K = (pairs_P // num_groups)[pair_K]
    shares_title = torch.zeros_like(allowed)
    shares_title[row_K, item_K] = True

    kept = allowed[row_K, item_K]
    pair_K, item_K, row_K = pair_K[kept], item_K[kept], row_K[kept]
    order = scores[row_K, item_K].argsort(descending=True, stable=True)  # by pair, then score, then item
    order = order[pair_K[order].argsort(stable=True)]
    return TitleMembers(pair_K[order], row_K[order], item_K[order], pair_of_target_T, shares_title)


def _title_representatives(members: TitleMembers) -> Tensor:
    """``[T]``: the item whose rank each target takes."""
    first_candidate_P = _starts(torch.bincount(members.pairs))
    return members.items[first_candidate_P[members.pair_of_target] + _position_within(members.pair_of_target)]


def _ranks_in_order(scores: Tensor, allowed: Tensor, shares_title: Tensor, rows: Tensor, items: Tensor) -> Tensor:
    """Rank of item ``items[t]`` in row ``rows[t]``: by score, then sharing no target's title, then index."""
    index_I = torch.arange(scores.shape[1], device=scores.device)
    ranks = torch.empty_like(rows)
    block = max(1, _CELLS // scores.shape[1])
    for start in range(0, len(rows), block):
        row, item = rows[start : start + block], items[start : start + block]
        own = scores[row, item][:, None]
        others = scores[row]
        tied_before = (others == own) & (~shares_title[row] | (index_I < item[:, None]))
        ranks[start : start + block] = (((others > own) | tied_before) & allowed[row]).sum(dim=1)
    return ranks


def _ideal_gain(cutoff: int) -> Tensor:
    """``[cutoff + 1]`` float64, discounted gain of 0, 1, … targets at the top."""
    discounts = 1 / torch.log2(torch.arange(cutoff, dtype=torch.float64) + 2)
    return torch.cat([torch.zeros(1, dtype=torch.float64), discounts.cumsum(0)])


def _position_within(groups: Tensor) -> Tensor:
    """How many earlier entries of ``groups`` have the same value, for each entry."""
    order = groups.argsort(stable=True)
    starts = _starts(torch.bincount(groups))
    position = torch.empty_like(groups)
    position[order] = torch.arange(len(groups), device=groups.device) - starts[groups[order]]
    return position


def _starts(sizes: Tensor) -> Tensor:
    """First position of each group when groups of ``sizes`` stand one after the other."""
    return sizes.cumsum(0) - sizes
