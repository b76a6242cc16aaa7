"""The first items of each ranking, in the order that the metrics count by.

Shape letters: B rows (users), I items, T targets, M masked pairs, K items kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fellrec.functional.ranking import TitleMembers, title_members

_CELLS = 1 << 24
"""Comparisons of a target with an item that are held in memory at once."""


class FirstItems(NamedTuple):
    """The heads of several users' rankings.

    Attributes:
        items: ``[B, K]`` int64, best first; -1 behind the last where fewer than K are ranked.
        scores: ``[B, K]`` float32, descending; -inf behind the last.
        is_tied: ``[B]`` bool: whether some target's score is that of an item which is no target. Only there does the
            order follow from a rule about ties; anyone who breaks them otherwise may find other figures.
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
    """The ``count`` best items of each row, every target at a place that ``fellrec.functional.ranking`` gives it.

    So metrics of this list are those of ``target_ranks``, with its rules (METHOD section 5): items tied with a target
    stand before it, and of the items with a target's title the target has the best place, whose score is given for it.
    Among themselves, tied items stand in the order of their index.

    Args:
        scores: ``[B, I]`` floats without NaN, higher is better; not changed.
        targets: ``[T]`` int64 row and ``[T]`` int64 item of each target.
        masked: ``[M]`` int64 row and ``[M]`` int64 item of each pair to leave out; a target never is.
        title_groups: ``[I]`` int64, items with one title share a number; ``None``: all titles differ.
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
    """Let items of one title change places, so that targets have the best of them.

    Args:
        members: Items that share a title with a target.
        labels: ``[B, I]`` int64 which item stands in an item's place; changed.
        is_target: ``[B, I]`` bool.
    """
    others = ~is_target[members.rows, members.items]
    order = (2 * members.pairs + others).argsort(stable=True)
    labels[members.rows, members.items] = members.items[order]
    return labels


def _distinct_keys(scores: Tensor, comes_last: Tensor) -> Tensor:
    """``[B, I]`` int64 in the order of score, then not ``comes_last``, then lower index.

    The bits of a float, read as an integer, order floats of one sign; those of negative ones have to be turned round.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    by_score = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    index_I = torch.arange(scores.shape[1], device=scores.device)
    return by_score + ((~comes_last).long() << 31) + (torch.iinfo(torch.int32).max - index_I)


def _tied_rows(scores: Tensor, others: Tensor, rows: Tensor, items: Tensor) -> Tensor:
    """``[B]`` bool: rows in which an item of ``others [B, I]`` has the score of one of the items given."""
    is_tied = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    block = max(1, _CELLS // scores.shape[1])
    for start in range(0, len(rows), block):
        row, item = rows[start : start + block], items[start : start + block]
        found = ((scores[row] == scores[row, item][:, None]) & others[row]).any(dim=1)
        is_tied[row[found]] = True
    return is_tied
