"""Texts as token ids, made once per run, and their assembly into batches without a loop over rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fellrec.errors import BackboneError


class TokenizedTexts:
    """One text per item as token ids.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: One text per item.
        max_tokens: Longest text in tokens; longer ones are cut on the right.
        ending: Tokens that a text ends with after it was cut, such as the line break that it lost.
        prefix: Tokens that every text begins with, beside ``max_tokens``.

    Attributes:
        tokens: ``[I, T]`` int64, padded with 0 on the right.
        inside: ``[I, T]`` bool, true for tokens.
        lengths: ``[I]`` int64, at least 1.

    Raises:
        BackboneError: If the tokenizer turns a text into nothing.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        max_tokens: int,
        ending: Sequence[int] = (),
        prefix: Sequence[int] = (),
    ) -> None:
        encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        kept = max_tokens - len(ending)
        rows = [ids if len(ids) <= max_tokens else [*ids[:kept], *ending] for ids in encoded]
        self.lengths = torch.tensor([len(ids) for ids in rows])
        if int(self.lengths.min()) == 0:
            empty = int(self.lengths.argmin())
            raise BackboneError(f"item {empty} has no tokens: the tokenizer turns {texts[empty]!r} into nothing")
        rows, self.lengths = [[*prefix, *ids] for ids in rows], self.lengths + len(prefix)
        self.inside = torch.arange(int(self.lengths.max()))[None, :] < self.lengths[:, None]
        self.tokens = torch.zeros(self.inside.shape, dtype=torch.long)
        self.tokens[self.inside] = torch.tensor([token for ids in rows for token in ids])

    def of(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of each row's items one after the other.

        Args:
            items: ``[B, H]`` int64, -1 where there is none.

        Returns:
            Tokens ``[B, H · T]`` and whether each place holds one ``[B, H · T]``.
        """
        known = items.clamp(min=0)
        inside = self.inside[known] & (items >= 0)[:, :, None]
        return self.tokens[known].flatten(1), inside.flatten(1)


def compact(tokens: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Push each row's tokens together, to the left.

    Args:
        tokens: ``[B, N]`` int64.
        inside: ``[B, N]`` bool: which of them count.

    Returns:
        Token ids ``[B, L]``, right-padded with 0, L the longest row; and for each place of the input the position
        ``[B, N]`` of the last counting token up to it.

    Example:
        >>> compact(torch.tensor([[5, 0, 6]]), torch.tensor([[True, False, True]]))
        (tensor([[5, 6]]), tensor([[0, 0, 1]]))
    """
    positions = inside.cumsum(dim=1) - 1
    ids = torch.zeros(len(tokens), int(positions[:, -1].max()) + 1, dtype=torch.long)
    row, column = inside.nonzero(as_tuple=True)
    ids[row, positions[row, column]] = tokens[row, column]
    return ids, positions


def repeat_row(ids: Sequence[int], num_rows: int) -> tuple[Tensor, Tensor]:
    """The same tokens for every row ``[num_rows, n]``, all of them counting."""
    tokens = torch.tensor(list(ids), dtype=torch.long).expand(num_rows, len(ids))
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def pad_left(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Move right-padded rows to the right end.

    Args:
        ids: ``[B, L]`` int64, right-padded.
        lengths: ``[B]`` int64.

    Returns:
        Left-padded ids ``[B, L]`` and attention mask ``[B, L]`` int64.

    Example:
        >>> pad_left(torch.tensor([[5, 6, 0]]), torch.tensor([2]))
        (tensor([[0, 5, 6]]), tensor([[0, 1, 1]]))
    """
    column = torch.arange(ids.shape[1])[None, :] - (ids.shape[1] - lengths)[:, None]
    mask = column >= 0
    return torch.where(mask, ids.gather(1, column.clamp(min=0)), 0), mask.long()
