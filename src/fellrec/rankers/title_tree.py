"""Titles as a tree of tokens that a model reads as one sequence: what titles have in common is computed once.

Shape letters: n tokens of a tree that another one follows, m titles, T tokens of a title, L of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fellrec.functional.trie import build_trie


@dataclass(frozen=True)
class TitleTree:
    """Some titles, in the order of their tokens.

    Attributes:
        token: ``[n]`` int64 input tokens. The last one of a title predicts nothing, so it is none of them.
        depth: ``[n]`` int64 number of tokens of the title before each.
        titles: ``[m, T]`` int64 tokens of the titles.
        inside: ``[m, T]`` bool, false for padding on the right.
        before: ``[m, T]`` int64 input that predicts each token of the titles, from 1; 0 is the end of the prompt.
    """

    token: Tensor
    depth: Tensor
    titles: Tensor
    inside: Tensor
    before: Tensor

    def to(self, device: torch.device) -> TitleTree:
        """Copy to a device."""
        return TitleTree(*(tensor.to(device) for tensor in vars(self).values()))

    def sees(self, mask: Tensor) -> Tensor:
        """What each input attends to: the prompt, and the beginning of its own title.

        Args:
            mask: ``[b, L]``, 1 for the tokens of a prompt and 0 for padding.

        Returns:
            ``[b, 1, n, L + n]`` bool.
        """
        n = len(self.token)
        own = torch.zeros(n + 1, n + 1, dtype=torch.bool, device=mask.device)
        for place in range(1, self.before.shape[1]):
            here = self.inside[:, place]
            reader, read = self.before[here, place], self.before[here, 1 : place + 1]
            own[reader[:, None], read] = True
        prompt = mask.bool()[:, None, None, :].expand(-1, 1, n, -1)
        return torch.cat([prompt, own[None, None, 1:, 1:].expand(len(mask), 1, n, n)], dim=3)


def title_trees(tokens: Tensor, inside: Tensor, titles_together: int) -> tuple[list[TitleTree], Tensor]:
    """The trees of a catalogue; equal titles occur once.

    Args:
        tokens: ``[I, T]`` int64.
        inside: ``[I, T]`` bool, false for padding on the right.
        titles_together: Titles in one tree.

    Returns:
        The trees, and ``[I]`` int64 place of each item among the titles of all trees.
    """
    distinct, place = tokens.masked_fill(~inside, -1).unique(dim=0, return_inverse=True)
    return list(_trees(distinct, titles_together)), place


def _trees(distinct: Tensor, titles_together: int) -> Iterator[TitleTree]:
    for titles in distinct.split(titles_together):
        inside = titles >= 0
        trie = build_trie(titles.clamp(min=0), inside)
        inner = (trie.num_children[1:] > 0).nonzero()[:, 0] + 1
        input_of_node = torch.zeros(len(trie.token), dtype=torch.long)
        input_of_node[inner] = torch.arange(1, len(inner) + 1)
        before = torch.where(inside, input_of_node[torch.where(inside, trie.path, 0)], 0)
        depth = torch.zeros(len(inner) + 1, dtype=torch.long)
        depth[before] = torch.arange(titles.shape[1]).expand_as(before).where(inside, 0)
        yield TitleTree(trie.token[inner], depth[1:] - 1, titles.clamp(min=0), inside, before)
