"""Where the titles of items are in the inputs of a model: what of a text is private.

The rest of a prompt is the same for all users, and recovering it is worth nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.data.text import TokenizedTexts
from fellrec.models.module import Objective


def texts_of(objective: Objective) -> list[TokenizedTexts]:
    """The texts by which an objective names items in its inputs, one per item.

    Those of histories come first; empty for an objective that does not tell them.
    """
    names = ("history_text", "lines", "titles")
    return [text for name in names if isinstance(text := getattr(objective, name, None), TokenizedTexts)]


def title_numbers(objective: Objective, ids: Tensor, items: Tensor) -> Tensor:
    """Which title each token of a batch belongs to.

    Tokens that all texts begin or end with, such as a line break, are part of no title.

    Args:
        objective: Names the items.
        ids: ``[B, L]`` int64 token ids.
        items: ``[B, W]`` int64 items that may be in each row, -1 for none.

    Returns:
        ``[B, L]`` int64, numbers from 0 over the whole batch; -1 for tokens of no title.
    """
    numbers = torch.full(ids.shape, -1, dtype=torch.long)
    texts = [(text, *shared_ends(text)) for text in texts_of(objective)]
    found = 0
    for row, (own, its_items) in enumerate(zip(ids.cpu(), items.cpu(), strict=True)):
        is_free = torch.ones(len(own), dtype=torch.bool)
        for text, before, after in texts:
            for item in its_items[its_items >= 0].tolist():
                length = int(text.lengths[item])
                place = _find(own, text.tokens[item, :length], is_free)
                if place is not None:
                    is_free[place : place + length] = False
                    numbers[row, place + before : place + length - after] = found
                    found += 1
    return numbers.to(ids.device)


def shared_ends(text: TokenizedTexts) -> tuple[int, int]:
    """How many tokens all texts begin with, and end with; of the shortest text one token is left."""
    most = int(text.lengths.min()) - 1
    last = (text.lengths[:, None] - 1 - torch.arange(max(most, 0))).clamp(min=0)
    ends = text.tokens.gather(1, last)
    before = _num_equal(text.tokens[:, : max(most, 0)])
    return before, min(_num_equal(ends), most - before) if most > 0 else 0


def _num_equal(columns: Tensor) -> int:
    """How many columns from the left have one value in all rows."""
    is_same = (columns == columns[:1]).all(dim=0)
    return int(is_same.long().cumprod(dim=0).sum())


def _find(row: Tensor, wanted: Tensor, is_free: Tensor) -> int | None:
    """The first place of some tokens in a row where all positions are free."""
    if len(wanted) > len(row):
        return None
    same = (row.unfold(0, len(wanted), 1) == wanted) & is_free.unfold(0, len(wanted), 1)
    places = same.all(dim=1).nonzero()
    return int(places[0]) if len(places) else None
