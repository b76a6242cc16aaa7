"""Clipping and Gaussian noise of what clients send through the cut.

Shape letters: B rows, L tokens, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fellrec.functional.rng import derive_seed


@dataclass(frozen=True)
class Disturbance:
    """What is done to tensors ``[B, L, D]`` of one kind before they are packed.

    Attributes:
        clip: Largest L2 norm of a token's vector; ``None`` for no limit.
        std: Standard deviation of the noise that is then added to every entry.
        seed: Of the run.
    """

    clip: float | None = None
    std: float = 0.0
    seed: int = 0

    def __call__(self, tensor_BLD: Tensor, *where: int | str) -> Tensor:
        """The tensor itself if there is nothing to do.

        Args:
            tensor_BLD: Floating-point.
            where: Names the tensor: its noise is a function of this and the seed.
        """
        found = tensor_BLD
        if self.clip is not None:
            norms = found.detach().float().norm(dim=-1, keepdim=True)
            found = found * (self.clip / norms.clamp(min=self.clip)).to(found.dtype)
        if self.std:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "cut", *where))
            noise = torch.randn(found.shape, generator=generator, dtype=torch.float32)
            found = found + (self.std * noise).to(found.device, found.dtype)
        return found


@dataclass(frozen=True)
class CutNoise:
    """What is done to hidden states and to gradients; nothing by default."""

    hidden: Disturbance = Disturbance()
    gradient: Disturbance = Disturbance()
