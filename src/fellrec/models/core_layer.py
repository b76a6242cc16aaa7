"""A linear layer with an adapter ``s · B · C · A`` of which only C is trained."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from fellrec.errors import BackboneError
from fellrec.functional.cores import joined, orthonormal
from fellrec.models.dropout import PackedDropout


class CoreLayer(nn.Module, BaseTunerLayer):
    """Adds ``s · B · C · A`` to a frozen layer; all parameters of the adapter are float32.

    A ``[R, in]`` and B ``[out, R]`` are frozen, with orthonormal rows and columns that depend on seed and name only. C
    starts as 0.

    Args:
        base_layer: Linear, or GPT-2's Conv1D.
        name: Of the layer in the whole model.
        seed: Of A and B.
        num_heads: Matrices on the diagonal of C.
        rank: Their size r; R is ``num_heads * rank``.
        scale: s.
        dropout: On the input of A.
        has_scales: Whether each head has a trained factor, which starts as 1.

    Attributes:
        lora_cores: The matrices, ``[num_heads, rank, rank]``.
        lora_scales: Their factors ``[num_heads]``, or ``None``.

    Raises:
        BackboneError: If R is larger than a side of the layer.
    """

    def __init__(
        self,
        base_layer: Any,
        name: str,
        *,
        seed: int,
        num_heads: int,
        rank: int,
        scale: float,
        dropout: float,
        has_scales: bool,
    ) -> None:
        super().__init__()
        size_out, size_in = sizes_of(base_layer)
        self.base_layer = base_layer
        self.scale = scale
        self.dropout = PackedDropout(dropout) if dropout else nn.Identity()
        device = base_layer.weight.device
        a, b = outer_factors(size_out, size_in, name, seed, num_heads, rank, is_empty=device.type == "meta")
        self.frozen_a = nn.Parameter(a.to(device), requires_grad=False)
        self.frozen_b = nn.Parameter(b.to(device), requires_grad=False)
        self.lora_cores = nn.Parameter(torch.zeros(num_heads, rank, rank, device=device))
        self.lora_scales = nn.Parameter(torch.ones(num_heads, device=device)) if has_scales else None

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, plus the adapter's unless it is switched off."""
        output: Tensor = self.base_layer(hidden, *args, **kwargs)
        if self.disable_adapters:
            return output
        inner = F.linear(self.dropout(hidden.to(self.frozen_a.dtype)), self.frozen_a)
        inner = F.linear(inner, joined(self.lora_cores, self.lora_scales))
        return (output + self.scale * F.linear(inner, self.frozen_b)).to(output.dtype)


def sizes_of(layer: Any) -> tuple[int, int]:
    """Outputs and inputs of a Linear or Conv1D."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    return layer.out_features, layer.in_features


def outer_factors(
    size_out: int, size_in: int, name: str, seed: int, num_heads: int, rank: int, is_empty: bool = False
) -> tuple[Tensor, Tensor]:
    """A ``[R, in]`` and B ``[out, R]`` of a layer.

    Args:
        size_out: Outputs of the layer.
        size_in: Its inputs.
        name: Of the layer in the whole model.
        seed: Of both.
        num_heads: Number of heads.
        rank: Rank of a head.
        is_empty: Whether only shapes are needed.

    Raises:
        BackboneError: If R is larger than a side of the layer.
    """
    num_columns = num_heads * rank
    if num_columns > min(size_out, size_in):
        heads = "" if num_heads == 1 else f" with adapter.num_heads={num_heads}"
        raise BackboneError(
            f"adapter.rank={rank}{heads} is not allowed: {name} has {size_out} outputs and {size_in} inputs, so that "
            f"the rank{'' if num_heads == 1 else ' times the number of heads'} is at most {min(size_out, size_in)}"
        )
    if is_empty:
        return torch.empty(num_columns, size_in, device="meta"), torch.empty(size_out, num_columns, device="meta")
    a = orthonormal(num_columns, size_in, seed, "core adapter", name, "A")
    return a, orthonormal(size_out, num_columns, seed, "core adapter", name, "B")
