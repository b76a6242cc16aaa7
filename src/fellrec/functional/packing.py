"""Tensors in fewer bytes for the way between client and server."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PACKINGS = ("float32", "bfloat16", "int8")
"""As they are, halved, or one byte a number and a float32 scale a token."""


@dataclass(frozen=True)
class Packed:
    """A floating tensor ``[B, L, D]`` as it travels.

    Attributes:
        codes: ``[B, L, D]``, floating or int8.
        scale: ``[B, L, 1]`` float32 where ``codes`` is int8, else ``None``.
    """

    codes: Tensor
    scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return self.codes.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.codes.shape


def pack(tensor: Tensor, packing: str) -> Packed:
    """Encode a tensor.

    Args:
        tensor: ``[B, L, D]``, floating.
        packing: One of ``PACKINGS``. ``float32`` loses nothing: what is narrower already stays so.

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
    """Decode to a floating type on a device.

    Example:
        >>> unpack(pack(torch.tensor([[[0.0, -2.5]]]), "int8"), torch.float32, torch.device("cpu"))
        tensor([[[ 0.0000, -2.5000]]])
    """
    codes = packed.codes.to(device)
    if packed.scale is None:
        return codes.to(dtype)
    return (codes.float() * packed.scale.to(device)).to(dtype)
