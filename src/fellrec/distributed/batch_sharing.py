"""One client on several ranks: each takes its rows of every batch, and all take the same step.

Gradients are summed by one all-reduce over the adapter, not by ``DistributedDataParallel``: adapters are small, they
move in and out of the backbone, a rank may have no row of a small batch, and a rank whose share failed must still tell
the others, who would wait for it otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fellrec.errors import SplitError, TrainingError
from fellrec.functional.rng import derive_seed

_OF_TARGETS = ("rows", "columns", "targets", "nodes")
"""Entries of a batch with one element per target; all others have one row per training row."""


class BatchSharing:
    """This rank's part in the training of its group's clients.

    Args:
        members: Ranks of the group.
        rank: This one.
        device: Of the gradients.
        timeout_seconds: Longest wait for the others.
    """

    def __init__(self, members: Sequence[int], rank: int, device: torch.device, timeout_seconds: float) -> None:
        self.members = tuple(members)
        self.rank = rank
        self.position = self.members.index(rank)
        # The group is made by its members alone: the other ranks need not take part.
        self._group = dist.new_group(
            list(members),
            backend="nccl" if device.type == "cuda" else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
            use_local_synchronization=True,
        )

    def seed(self, seed: int) -> int:
        """The seed of this rank's random numbers: ranks must not drop out the same neurons of different rows."""
        return derive_seed(seed, "share", self.position) if self.position else seed

    def share(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """This rank's rows of a batch, ``None`` if there are none; see `take_rows`."""
        rows = torch.arange(self.position, len(batch["input_ids"]), len(self.members), device=batch["rows"].device)
        shared = take_rows(batch, rows)
        return shared if len(shared["targets"]) else None

    def combine(self, parameters: Sequence[nn.Parameter], total: float, error: Exception | None) -> float:
        """Sum gradients and losses of all ranks of the group; every rank has the same afterwards.

        Args:
            parameters: Their gradients are replaced by the sums; ``None`` stays where no rank has one.
            total: This rank's loss, summed over its targets.
            error: Why this rank's share failed, ``None`` if it did not.

        Returns:
            The loss of all ranks.

        Raises:
            TrainingError: If the share of another rank failed.
            SplitError: If another rank is gone.
        """
        parts = [_flat_gradient(p) if error is None else p.new_zeros(p.numel()).float() for p in parameters]
        present = [float(p.grad is not None and error is None) for p in parameters]
        device = parameters[0].device
        told = torch.tensor([*present, total, float(error is not None)], dtype=torch.float64, device=device)
        flat = torch.cat(parts)
        try:
            dist.all_reduce(told, group=self._group)
            dist.all_reduce(flat, group=self._group)
        except RuntimeError as problem:
            others = ", ".join(str(rank) for rank in self.members if rank != self.rank)
            raise SplitError(f"process {others}, which trains with process {self.rank}, has ended") from problem
        if error is not None:
            raise error
        if told[-1] > 0:
            raise TrainingError("the training on the rows of another process failed")
        offset = 0
        for parameter, any_rank in zip(parameters, told[:-2].tolist(), strict=True):
            gradient = flat[offset : offset + parameter.numel()].view_as(parameter).to(parameter.dtype)
            parameter.grad = gradient if any_rank else None
            offset += parameter.numel()
        return float(told[-2])


def take_rows(batch: Mapping[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    """Some rows of a batch, with the targets in them.

    Args:
        batch: What an objective's ``collate`` makes: ``rows``, ``columns``, ``targets`` and ``nodes [T]``, all
            else ``[B, …]``.
        rows: ``[b]`` int64, ascending.

    Example:
        >>> batch = {"input_ids": torch.tensor([[1], [2], [3]]), "rows": torch.tensor([0, 1, 1, 2]),
        ...          "columns": torch.zeros(4), "targets": torch.tensor([7, 8, 9, 10])}
        >>> taken = take_rows(batch, torch.tensor([1, 2]))
        >>> taken["input_ids"].tolist(), taken["rows"].tolist(), taken["targets"].tolist()
        ([[2], [3]], [0, 0, 1], [8, 9, 10])
    """
    kept = torch.isin(batch["rows"], rows)
    taken = {key: tensor[kept] if key in _OF_TARGETS else tensor[rows] for key, tensor in batch.items()}
    taken["rows"] = torch.searchsorted(rows, taken["rows"])
    return taken


def _flat_gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        return parameter.new_zeros(parameter.numel()).float()
    return parameter.grad.flatten().float()
