"""A trie of token rows as flat tensors, so that many beams can be extended without a loop over them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Trie:
    """Every distinct prefix of some token rows is a node; the first nodes are roots, the empty prefixes.

    N nodes, E distinct rows. The children of a node have consecutive numbers, ascending by token.

    Attributes:
        token: ``[N]`` int64, the last token of the prefix; -1 for an empty one.
        first_child: ``[N]`` int64; anything where there are no children.
        num_children: ``[N]`` int64.
        end: ``[N]`` int64, number of the row that the node is the end of, in [0, E); -1 if a row ends elsewhere.
        only_end: ``[N]`` int64, the number of the only row that goes through the node; -1 for roots and where there are
            several.
        end_of_row: ``[I]`` int64, the number of each given row; equal rows share it.
        path: ``[I, T]`` int64, the node before each token of the given rows; anything outside of them.
        place: ``[I, T]`` int64, which child of that node the token is, from 0; anything outside of them.
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
        """E, the distinct rows."""
        return int(self.end.max()) + 1

    def to(self, device: torch.device) -> Trie:
        """The same on a device."""
        return Trie(*(getattr(self, field.name).to(device) for field in fields(self)))

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """All children of some nodes.

        Args:
            nodes: ``[n]`` int64.

        Returns:
            For each child, the position of its parent in ``nodes`` ``[c]``, ascending, and the child ``[c]``.
        """
        counts = self.num_children[nodes]
        parent = torch.repeat_interleave(counts)
        within = torch.arange(len(parent), device=nodes.device) - (counts.cumsum(0) - counts)[parent]
        return parent, self.first_child[nodes][parent] + within

    def of_children(self, values: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Pick what belongs to the tokens that go on from some nodes, out of what all tokens have.

        Args:
            values: ``[n, V]``.
            nodes: ``[n]`` int64.

        Returns:
            For each node's children, in their order, ``[n, C]``, -inf where there is none; and whether there is one.
        """
        counts = self.num_children[nodes][:, None]
        place = torch.arange(int(counts.max()), device=nodes.device)
        is_child = place < counts
        children = torch.where(is_child, self.first_child[nodes][:, None] + place, 0)
        return values.gather(1, self.token[children].clamp(min=0)).masked_fill(~is_child, -torch.inf), is_child


def build_trie(tokens: Tensor, inside: Tensor, roots: Tensor | None = None) -> Trie:
    """Make the trie of some rows, level by level.

    Args:
        tokens: ``[I, T]`` int64, at least 0.
        inside: ``[I, T]`` bool, true for the first tokens of a row, at least one.
        roots: ``[I]`` int64, the root that each row starts from, all of 0, 1, …; ``None``: all start from node 0.

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
    parent = torch.cat(parents)  # of the nodes after the roots: ascending, as levels are, and edges within a level
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
    """Which values are among the ``count`` largest of their group; of equal ones the first.

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
    order = order[groups[order].argsort(stable=True)]
    sizes = torch.bincount(groups)
    place = torch.arange(len(order), device=groups.device) - (sizes.cumsum(0) - sizes)[groups[order]]
    best = torch.zeros_like(groups, dtype=torch.bool)
    best[order] = place < count
    return best
