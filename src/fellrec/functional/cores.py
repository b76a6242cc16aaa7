"""Adapters ``s · B · C · A`` with frozen outer factors: C has one small trained matrix, or several on its diagonal.

Shape letters: h heads, r rank of a head, R = h·r columns of B and rows of A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.functional.rng import derive_seed

CORES, SCALES = "lora_cores", "lora_scales"
"""Last parts of the names of the trained parameters: matrices ``[h, r, r]``, and their factors ``[h]``."""


def joined(cores: Tensor, scales: Tensor | None = None) -> Tensor:
    """The matrices of all heads, times their factors, on the diagonal of one matrix ``[R, R]``.

    Args:
        cores: ``[h, r, r]``.
        scales: ``[h]``; ``None`` for ones.

    Example:
        >>> joined(torch.tensor([[[2.0]], [[3.0]]]), torch.tensor([1.0, 10.0])).tolist()
        [[2.0, 0.0], [0.0, 30.0]]
    """
    scaled = cores if scales is None else scales[:, None, None] * cores
    return scaled[0] if len(scaled) == 1 else torch.block_diag(*scaled)


def mean_of_scaled(cores: Tensor, scales: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum over clients of each head's matrix times its factor, ``Σ p_k s_{k,i} H_{k,i}``.

    Args:
        cores: ``[N, h, r, r]``.
        scales: ``[N, h]``.
        weights: ``[N]``.

    Returns:
        ``[h, r, r]``.

    Example:
        >>> cores, scales = torch.tensor([[[[1.0]]], [[[3.0]]]]), torch.tensor([[2.0], [4.0]])
        >>> mean_of_scaled(cores, scales, torch.tensor([0.5, 0.5])).item()  # (1 · 2 + 3 · 4) / 2
        7.0
    """
    return torch.einsum("n,nh,nhij->hij", weights.to(cores), scales, cores)


def orthonormal(rows: int, columns: int, *seed: int | str) -> Tensor:
    """A random matrix with orthonormal rows, or columns if there are fewer of them, ``[rows, columns]`` float32.

    It is computed in float64, so that the rounded values do not depend on the number of threads.

    Args:
        rows: Number of rows.
        columns: Number of columns.
        seed: What the values depend on, see ``derive_seed``.

    Example:
        >>> drawn = orthonormal(2, 5, 0, "layer")
        >>> (drawn @ drawn.T).round(decimals=5).abs().tolist(), torch.equal(drawn, orthonormal(2, 5, 0, "layer"))
        ([[1.0, 0.0], [0.0, 1.0]], True)
    """
    generator = torch.Generator().manual_seed(derive_seed(*seed))
    values = torch.empty(rows, columns, dtype=torch.float64)
    return torch.nn.init.orthogonal_(values, generator=generator).float()
