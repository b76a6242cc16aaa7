"""Rows of a batch in groups of similar length: a forward pass for each group, and one loss for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fellrec.data.batching import length_groups

Take = Callable[[Tensor, Tensor, Tensor], Tensor]


class RowGroups:
    """The rows of a batch by length, so that there is less padding.

    All rows are one group on other devices than the CPU: on a GPU, a small model takes as long for fewer rows.

    Args:
        lengths: ``[B]`` int64 number of tokens of each row.
    """

    def __init__(self, lengths: Tensor) -> None:
        groups = length_groups(lengths) if lengths.device.type == "cpu" else []
        self._groups = groups if len(groups) > 1 else []
        self._widths = [int(lengths[rows].max()) for rows in self._groups]

    def __len__(self) -> int:
        return max(1, len(self._groups))

    def inputs(self, ids: Tensor) -> list[Tensor]:
        """Token ids of each group, ``[B_g, L_g]``, from those of all rows ``[B, L]``, padded on the right."""
        if not self._groups:
            return [ids]
        return [ids[rows, :width] for rows, width in zip(self._groups, self._widths, strict=True)]

    def at(self, hidden: Sequence[Tensor], rows_T: Tensor, columns_T: Tensor, take: Take) -> Tensor:
        """Vectors at positions of the batch.

        Args:
            hidden: Hidden states ``[B_g, L_g, D]`` of each group of `inputs`.
            rows_T: ``[T]`` int64 row in the batch.
            columns_T: ``[T]`` int64 position in the row.
            take: Gives vectors ``[t, D]`` of one group's hidden states at rows of the group and positions in them.
        """
        if not self._groups:
            return take(hidden[0], rows_T, columns_T)
        parts, order = [], []
        for rows, hidden_BLD in zip(self._groups, hidden, strict=True):
            here = torch.isin(rows_T, rows).nonzero()[:, 0]
            parts.append(take(hidden_BLD, torch.searchsorted(rows, rows_T[here]), columns_T[here]))
            order.append(here)
        return torch.cat(parts).index_select(0, torch.cat(order).argsort())
