"""Compression of the tensors that are transferred between client and server."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PACKINGS = ("float32", "bfloat16", "int8")
"""Unchanged; cast to bfloat16; or quantised to int8 with one float32 scale per token."""


@dataclass(frozen=True)
class Packed:
    """A packed floating-point tensor ``[B, L, D]``.

    Attributes:
        codes: ``[B, L, D]``, floating-point or int8.
        scale: ``[B, L, 1]`` float32 if ``codes`` is int8, else ``None``.
    """

    codes: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes to transfer."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.codes.shape


def pack(tensor: Tensor, packing: str) -> Packed:
    """Encode a tensor; detached from its graph.

    Args:
        tensor: ``[B, L, D]``, floating-point.
        packing: One of ``PACKINGS``. ``float32`` is lossless: it keeps the tensor's dtype, which may be narrower.

    Example:
        >>> pack(torch.tensor([[[0.0, -2.54]]]), "int8")
        Packed(codes=tensor([[[   0, -127]]], dtype=torch.int8), scale=tensor([[[0.0200]]]))
    """
    tensor = tensor.detach()
    if packing == "int8":
        values = tensor.float()
        largest = values.abs().amax(dim=-1, keepdim=True)
        scale = torch.where(largest > 0, largest / 127, 1.0)
        return Packed((values / scale).round().to(torch.int8), scale)
    return Packed(tensor.to(torch.bfloat16) if packing == "bfloat16" else tensor)


def unpack(packed: Packed, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Decode to a floating-point dtype on a device.

    Example:
        >>> unpack(pack(torch.tensor([[[0.0, -2.5]]]), "int8"), torch.float32, torch.device("cpu"))
        tensor([[[ 0.0000, -2.5000]]])
    """
    codes = packed.codes.to(device)
    if packed.scale is None:
        return codes.to(dtype)
    return (codes.float() * packed.scale.to(device)).to(dtype)
