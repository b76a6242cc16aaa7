"""Tokenised texts and their vectorised assembly into batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fellrec.errors import BackboneError


def plain_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, in which nothing is a special token: a title may contain ``</s>`` or ``[SEP]``.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: Any texts.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return [[token for token in ids if token not in special] for ids in encoded]  # unigram models may give them still


class TokenizedTexts:
    """Token ids of one text per item.

    Args:
        tokenizer: A Hugging Face tokenizer.
        texts: One text per item.
        max_tokens: Maximum length in tokens; longer texts are truncated on the right.
        ending: Last tokens of a truncated text, such as a line break; they count towards ``max_tokens``.
        prefix: Tokens before every text, not counted in ``max_tokens``.
        suffix: Tokens after every text, not counted in ``max_tokens``.
        allow_empty: Whether a text may have no tokens.

    Attributes:
        tokens: ``[I, T]`` int64 token ids, padded with 0 on the right.
        inside: ``[I, T]`` bool, true for tokens, false for padding.
        lengths: ``[I]`` int64 number of tokens.

    Raises:
        BackboneError: If a text has no tokens and ``allow_empty`` is false.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Sequence[str],
        max_tokens: int,
        ending: Sequence[int] = (),
        prefix: Sequence[int] = (),
        suffix: Sequence[int] = (),
        allow_empty: bool = False,
    ) -> None:
        encoded = plain_tokens(tokenizer, texts)
        kept = max_tokens - len(ending)
        rows = [ids if len(ids) <= max_tokens else [*ids[:kept], *ending] for ids in encoded]
        if not allow_empty and [] in rows:
            empty = rows.index([])
            raise BackboneError(f"item {empty} has no tokens: the tokenizer gives none for {texts[empty]!r}")
        rows = [[*prefix, *ids, *suffix] for ids in rows]
        self.lengths = torch.tensor([len(ids) for ids in rows])
        self.inside = torch.arange(int(self.lengths.max()))[None, :] < self.lengths[:, None]
        self.tokens = torch.zeros(self.inside.shape, dtype=torch.long)
        self.tokens[self.inside] = torch.tensor([token for ids in rows for token in ids])

    def of(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Concatenate the padded tokens of each row's items.

        Args:
            items: ``[B, H]`` int64 item indices, -1 for padding.

        Returns:
            Tokens ``[B, H · T]`` int64, and their mask ``[B, H · T]`` bool, false for padding.
        """
        known = items.clamp(min=0)
        inside = self.inside[known] & (items >= 0)[:, :, None]
        return self.tokens[known].flatten(1), inside.flatten(1)

    def lengths_of(self, items: Tensor) -> Tensor:
        """Number of tokens ``[B]`` of all items of each row ``[B, H]``, -1 for padding."""
        return torch.where(items >= 0, self.lengths[items.clamp(min=0)], 0).sum(dim=1)


def compact(tokens: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Remove the padding inside rows: move each row's tokens to the left.

    Args:
        tokens: ``[B, N]`` int64.
        inside: ``[B, N]`` bool, true for tokens, false for padding.

    Returns:
        Token ids ``[B, L]``, right-padded with 0, L the longest row; and for each position of the input the output
        position ``[B, N]`` of the last token up to it.

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
    """Repeat a token sequence: tokens ``[num_rows, n]`` int64 and their mask ``[num_rows, n]`` bool, all true."""
    tokens = torch.tensor(list(ids), dtype=torch.long).expand(num_rows, len(ids))
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def pad_left(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Convert right-padded rows to left-padded rows.

    Args:
        ids: ``[B, N]`` int64, right-padded, B at least 1.
        lengths: ``[B]`` int64.

    Returns:
        Left-padded ids ``[B, L]`` and attention mask ``[B, L]`` int64, L the longest row.

    Example:
        >>> pad_left(torch.tensor([[5, 6, 0, 0], [7, 8, 9, 0]]), torch.tensor([2, 3]))
        (tensor([[0, 5, 6],
                [7, 8, 9]]), tensor([[0, 1, 1],
                [1, 1, 1]]))
    """
    width = int(lengths.max())
    column = torch.arange(width)[None, :] - (width - lengths)[:, None]
    mask = column >= 0
    return torch.where(mask, ids.gather(1, column.clamp(min=0)), 0), mask.long()
