"""LoRA ranks that differ between clients: a smaller adapter is one of the largest rank whose other entries are zero.

Rows of A and columns of B that are zero have gradients of zero and stay zero, so such an adapter is trained exactly as
one of its own rank is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fellrec.functional.by_size import PerClient, check_length, of_clients
from fellrec.functional.lora import is_factor
from fellrec.state.tensor_store import StoredTensors


class Ranks:
    """The rank of each client's adapter.

    Args:
        of_client: Rank by client.
        num_clients: C.

    Raises:
        ConfigError: If there is not one for each client.

    Example:
        >>> ranks = Ranks([1, 2], num_clients=2)
        >>> a = torch.ones(2, 3)
        >>> ranks.narrow(0, "x.lora_A.weight", a).tolist(), ranks.padded("x.lora_A.weight", a[:1], a).tolist()
        ([[1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    """

    def __init__(self, of_client: Sequence[int], num_clients: int) -> None:
        check_length(of_client, num_clients, "adapter.rank")
        self.of_client = list(of_client)
        self._parts: dict[int, tuple[StoredTensors, StoredTensors]] = {}

    @classmethod
    def of_setting(cls, rank: PerClient, sizes: Sequence[int]) -> Ranks:
        """The ranks that a value of ``adapter.rank`` gives clients.

        Args:
            rank: One for all, that of each client, or ranks by size, see ``by_size``.
            sizes: Number of training samples of each client.

        Raises:
            ConfigError: If a list has not one for each client.

        Example:
            >>> [Ranks.of_setting(rank, [9, 70]).of_client for rank in (4, [1, 2], {0: 2, 50: 8})]
            [[4, 4], [1, 2], [2, 8]]
        """
        return cls(of_clients(rank, sizes, "adapter.rank"), len(sizes))

    def of_row(self, row: int) -> int:
        """The rank of a row of the population."""
        return self.of_client[row % len(self.of_client)]

    def change(self, row: int, rank: int) -> None:
        """Give a row's client another rank from now on."""
        self.of_client[row % len(self.of_client)] = rank

    def narrow(self, row: int, name: str, tensor: Tensor) -> Tensor:
        """A row's part of a parameter: the first rows of A, the first columns of B, all of the others; a view."""
        rank = self.of_row(row)
        if is_factor(name, "A"):
            return tensor[:rank]
        return tensor[:, :rank] if is_factor(name, "B") else tensor

    def cut(self, row: int, name: str, tensor: Tensor) -> Tensor:
        """A parameter with zeros beyond the row's rank."""
        return self.padded(name, self.narrow(row, name, tensor), tensor)

    def padded(self, name: str, part: Tensor, like: Tensor) -> Tensor:
        """A part of a parameter with zeros where the parameter has more."""
        if part.shape == like.shape:
            return part
        whole = torch.zeros(like.shape, dtype=part.dtype, device=part.device)
        whole[: part.shape[0], : part.shape[1]] = part
        return whole

    def part(self, row: int, version: StoredTensors) -> StoredTensors:
        """A version of an adapter with zeros beyond the row's rank; the same object for the same version and rank."""
        rank = self.of_row(row)
        known = self._parts.get(rank)
        if known is None or known[0] is not version:
            tensors = {name: self.cut(row, name, tensor) for name, tensor in version.tensors().items()}
            known = version, StoredTensors(tensors)
            self._parts[rank] = known
        return known[1]
