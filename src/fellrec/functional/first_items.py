"""The first items of each ranking, in the order that the metrics use.

Shape letters: B rows (users), I items, T targets, M masked pairs, K returned items.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fellrec.functional.ranking import MAX_COMPARISONS, TitleMembers, title_members


class FirstItems(NamedTuple):
    """The first K items of several users' rankings.

    Attributes:
        items: ``[B, K]`` int64, best first, padded with -1 if fewer than K items are ranked.
        scores: ``[B, K]`` float32, descending, padded with -inf.
        is_tied: ``[B]`` bool, whether a target has the same score as an item that is not a target. In these rows the
            metrics depend on the order of ties.
    """

    items: Tensor
    scores: Tensor
    is_tied: Tensor


def first_items(
    scores: Tensor,
    targets: tuple[Tensor, Tensor],
    masked: tuple[Tensor, Tensor],
    title_groups: Tensor | None,
    count: int,
) -> FirstItems:
    """The ``count`` best items of each row, with every target at the rank that ``target_ranks`` gives.

    Metrics of this list equal those of ``target_ranks`` (METHOD section 5). Items tied with a target precede it. Among
    the items with the title of a target, the target takes the best rank, and the score of that rank. Other tied items
    are in the order of their indices.

    Args:
        scores: ``[B, I]`` floats without NaN, higher is better; not changed.
        targets: ``[T]`` int64 row and ``[T]`` int64 item of each target.
        masked: ``[M]`` int64 row and ``[M]`` int64 item of each pair to leave out; targets are never left out.
        title_groups: ``[I]`` int64, equal for items with the same title; ``None`` if all titles differ.
        count: K, at most I.

    Example:
        >>> none = torch.tensor([], dtype=torch.long)
        >>> scores = torch.tensor([[0.9, 0.5, 0.5, 0.1]])
        >>> first = first_items(scores, (torch.tensor([0]), torch.tensor([1])), (none, none), None, 3)
        >>> first.items.tolist(), first.is_tied.tolist()  # item 1 is the target, tied with item 2
        ([[0, 2, 1]], [True])
    """
    rows, items = targets
    scores = scores.float()
    is_target = torch.zeros_like(scores, dtype=torch.bool)
    is_target[rows, items] = True
    allowed = torch.ones_like(is_target)
    allowed[masked] = False
    allowed |= is_target
    labels, shares_title = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape), is_target
    if title_groups is not None:
        members = title_members(scores, allowed, rows, items, title_groups)
        labels, shares_title = _targets_first(members, labels.clone(), is_target), members.shares_title
    keys = _distinct_keys(scores, shares_title).masked_fill(~allowed, torch.iinfo(torch.int64).min)
    first = keys.topk(count, dim=1).indices
    is_there = allowed.gather(1, first)
    return FirstItems(
        items=labels.gather(1, first).masked_fill(~is_there, -1),
        scores=scores.gather(1, first).masked_fill(~is_there, -torch.inf),
        is_tied=_tied_rows(torch.empty_like(scores).scatter_(1, labels, scores), allowed & ~is_target, rows, items),
    )


def _targets_first(members: TitleMembers, labels: Tensor, is_target: Tensor) -> Tensor:
    """Permute the items of each title so that targets take the best ranks.

    Args:
        members: Items with the title of a target.
        labels: ``[B, I]`` int64 item at each item's rank; changed in place.
        is_target: ``[B, I]`` bool.
    """
    others = ~is_target[members.rows, members.items]
    order = (2 * members.pairs + others).argsort(stable=True)
    labels[members.rows, members.items] = members.items[order]
    return labels


def _distinct_keys(scores: Tensor, comes_last: Tensor) -> Tensor:
    """``[B, I]`` int64 sort keys: by score, then not ``comes_last``, then lower index.

    Float bits read as an integer are ordered for positive floats; for negative floats the bits are inverted.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    by_score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    index_I = torch.arange(scores.shape[1], device=scores.device)
    return by_score + ((~comes_last).long() << 31) + (torch.iinfo(torch.int32).max - index_I)


def _tied_rows(scores: Tensor, others: Tensor, rows: Tensor, items: Tensor) -> Tensor:
    """``[B]`` bool, rows in which an item of ``others [B, I]`` has the same score as one of the given items."""
    is_tied = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    block = max(1, MAX_COMPARISONS // scores.shape[1])
    for start in range(0, len(rows), block):
        row, item = rows[start : start + block], items[start : start + block]
        found = ((scores[row] == scores[row, item][:, None]) & others[row]).any(dim=1)
        is_tied[row[found]] = True
    return is_tied
