"""Dropout whose mask is drawn four elements at a time on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_LEVELS = 1 << 16
"""A mask compares 16 bits for each element."""


class PackedDropout(nn.Dropout):
    """``torch.nn.Dropout`` with a cheaper mask on the CPU, where PyTorch draws 32 or 64 bits for each element in turn.

    Four elements share the 64 bits of one draw, 16 bits each, from PyTorch's global generator. So the probability is
    rounded to a multiple of 2⁻¹⁶, and what is kept is scaled by the rounded one. The mask does not depend on the number
    of threads. On other devices it is PyTorch's.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> PackedDropout(0.25)(torch.ones(8))
        tensor([0.0000, 0.0000, 1.3333, 0.0000, 1.3333, 1.3333, 0.0000, 0.0000])
    """

    def forward(self, values: Tensor) -> Tensor:
        """Drop elements of a tensor of any shape, in training."""
        if not self.training or values.device.type != "cpu":
            return super().forward(values)
        dropped = min(round(self.p * _LEVELS), _LEVELS - 1)
        words = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        is_kept = words.view(torch.int16)[: values.numel()] >= dropped - _LEVELS // 2
        return values * is_kept.view(values.shape).to(values.dtype).mul_(_LEVELS / (_LEVELS - dropped))
