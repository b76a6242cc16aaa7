"""A trie of token sequences as flat tensors, for vectorised beam search."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fellrec.functional.ranking import position_within


@dataclass(frozen=True)
class Trie:
    """Trie with one node per distinct prefix of the given rows; the first nodes are the roots (empty prefixes).

    N nodes, E distinct rows ("ends"). The children of a node have consecutive indices, ascending by token.

    Attributes:
        token: ``[N]`` int64 last token of the prefix; -1 for roots.
        first_child: ``[N]`` int64 index of the first child; undefined for leaves.
        num_children: ``[N]`` int64.
        end: ``[N]`` int64 index in [0, E) of the row that ends at the node; -1 if none does.
        only_end: ``[N]`` int64 index of the row if exactly one distinct row passes through the node; else, and for
            roots, -1.
        end_of_row: ``[I]`` int64 index of each given row, equal for equal rows.
        path: ``[I, T]`` int64 node before each token of the given rows; undefined for padding.
        place: ``[I, T]`` int64 position of each token among the children of that node, from 0; undefined for padding.
    """

    token: Tensor
    first_child: Tensor
    num_children: Tensor
    end: Tensor
    only_end: Tensor
    end_of_row: Tensor
    path: Tensor
    place: Tensor

    @property
    def num_ends(self) -> int:
        """Number of distinct rows E."""
        return int(self.end.max()) + 1

    def to(self, device: torch.device) -> Trie:
        """Copy to a device."""
        return Trie(*(getattr(self, field.name).to(device) for field in fields(self)))

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """All children of the given nodes.

        Args:
            nodes: ``[n]`` int64.

        Returns:
            The position of each child's parent in ``nodes``, ``[c]`` int64, ascending; and the children ``[c]`` int64.
        """
        counts = self.num_children[nodes]
        parent = torch.repeat_interleave(counts)
        within = torch.arange(len(parent), device=nodes.device) - (counts.cumsum(0) - counts)[parent]
        return parent, self.first_child[nodes][parent] + within

    def of_children(self, values: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Select the values of the tokens of each node's children.

        Args:
            values: ``[n, V]``, one value per token of the vocabulary.
            nodes: ``[n]`` int64.

        Returns:
            Values of the children ``[n, C]``, padded with -inf; and their mask ``[n, C]`` bool, false for padding.
        """
        counts = self.num_children[nodes][:, None]
        place = torch.arange(int(counts.max()), device=nodes.device)
        is_child = place < counts
        children = torch.where(is_child, self.first_child[nodes][:, None] + place, 0)
        return values.gather(1, self.token[children].clamp(min=0)).masked_fill(~is_child, -torch.inf), is_child


def build_trie(tokens: Tensor, inside: Tensor, roots: Tensor | None = None) -> Trie:
    """Build the trie of token rows, level by level.

    Args:
        tokens: ``[I, T]`` int64 token ids.
        inside: ``[I, T]`` bool, true for tokens, false for padding on the right; at least one token per row.
        roots: ``[I]`` int64 root of each row, with every value in 0, 1, …; ``None`` for a single root.

    Example:
        >>> trie = build_trie(torch.tensor([[5, 7], [5, 9], [5, 7], [6, 0]]), torch.tensor([[1, 1]] * 3 + [[1, 0]]) > 0)
        >>> trie.token.tolist(), trie.num_children.tolist()
        ([-1, 5, 6, 7, 9], [2, 2, 0, 0, 0])
        >>> trie.end_of_row.tolist()
        [1, 2, 1, 0]
        >>> trie.children(torch.tensor([1, 0]))
        (tensor([0, 0, 1, 1]), tensor([3, 4, 1, 2]))
    """
    node = torch.zeros(len(tokens), dtype=torch.long) if roots is None else roots
    num_tokens, num_roots = int(tokens.max()) + 1, int(node.max()) + 1
    parents, labels, path, num_nodes = [], [torch.full((num_roots,), -1)], [node], num_roots
    for level in range(tokens.shape[1]):
        rows = inside[:, level].nonzero()[:, 0]
        edges, edge_of_row = (node[rows] * num_tokens + tokens[rows, level]).unique(return_inverse=True)
        parents.append(edges // num_tokens)
        labels.append(edges % num_tokens)
        node = node.index_copy(0, rows, num_nodes + edge_of_row)
        path.append(node)
        num_nodes += len(edges)
    parent = torch.cat(parents)  # of the nodes after the roots; ascending
    first_child = num_roots + torch.searchsorted(parent, torch.arange(num_nodes))
    ends, end_of_row = node.unique(return_inverse=True)
    end = torch.full((num_nodes,), -1)
    end[ends] = torch.arange(len(ends))
    before, after = torch.stack(path[:-1], dim=1), torch.stack(path[1:], dim=1)
    passed, rows_ends = after[inside], end_of_row[:, None].expand_as(after)[inside]
    least, most = (
        torch.full_like(end, -1).scatter_reduce(0, passed, rows_ends, how, include_self=False)
        for how in ("amin", "amax")
    )
    return Trie(
        token=torch.cat(labels),
        first_child=first_child,
        num_children=torch.bincount(parent, minlength=num_nodes),
        end=end,
        only_end=torch.where(least == most, least, -1),
        end_of_row=end_of_row,
        path=before,
        place=after - first_child[before],
    )


def is_among_best(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Whether each value is among the ``count`` largest of its group; of equal values the first.

    Args:
        values: ``[c]`` floats.
        groups: ``[c]`` int64.
        count: At least 1.

    Returns:
        ``[c]`` bool.

    Example:
        >>> is_among_best(torch.tensor([3.0, 1.0, 2.0, 7.0]), torch.tensor([0, 0, 0, 1]), count=2)
        tensor([ True, False,  True,  True])
    """
    order = values.argsort(descending=True, stable=True)
    best = torch.zeros_like(groups, dtype=torch.bool)
    best[order] = position_within(groups[order]) < count
    return best
