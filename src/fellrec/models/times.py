"""Seconds of a training step by what is computed: parts of the model in both directions, logits, optimiser, data."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fellrec.distributed.devices import wait_for


class Times:
    """What the local training tells of where it is; nothing is measured by this class."""

    def enter(self, name: str | None) -> None:
        """The seconds from now on belong to ``name``, or to nothing."""

    def enter_part(self, name: str, input_ids: Tensor | None = None) -> None:
        """The same inside of a training step, for a part of the model; outside of one it has no effect.

        Args:
            name: Of the part.
            input_ids: ``[B, L]`` if it is the head.
        """

    def leave_part(self, hidden_BLD: Tensor, name: str) -> Tensor:
        """A part's output, unchanged: what follows is not the part's, and the backward pass enters it here."""
        return hidden_BLD

    def count(self, batch: Mapping[str, Tensor]) -> None:
        """A batch with ``lengths [B]``, the tokens of its rows, is trained on."""


NO_TIMES = Times()


class PartTimes(Times):
    """Measures.

    On an accelerator every change waits for the device, which makes a step slower.

    Args:
        device: Of the model.

    Attributes:
        seconds: By name.
        num_tokens: Token ids that went through the model in training, with padding.
        num_inside: Those of the rows of the batches, without padding.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.num_tokens = self.num_inside = 0
        self._device = device
        self._name: str | None = None
        self._since = 0.0

    def enter(self, name: str | None) -> None:
        """See ``Times``."""
        wait_for(self._device)
        now = time.perf_counter()
        if self._name is not None:
            self.seconds[self._name] += now - self._since
        self._name, self._since = name, now

    def enter_part(self, name: str, input_ids: Tensor | None = None) -> None:
        """See ``Times``."""
        if self._name is not None:
            self.enter(name)
            self.num_tokens += 0 if input_ids is None else input_ids.numel()

    def leave_part(self, hidden_BLD: Tensor, name: str) -> Tensor:
        """See ``Times``."""
        if self._name is None:
            return hidden_BLD
        self.enter("logits")
        left: Tensor = _Boundary.apply(hidden_BLD, self, name)
        return left

    def count(self, batch: Mapping[str, Tensor]) -> None:
        """See ``Times``."""
        if "lengths" in batch:
            self.num_inside += int(batch["lengths"].sum())


class _Boundary(torch.autograd.Function):
    """The identity; its backward pass runs just before that of the part whose output it is."""

    @staticmethod
    def forward(ctx: Any, hidden_BLD: Tensor, times: PartTimes, name: str) -> Tensor:
        """Remember the part."""
        ctx.times, ctx.name = times, name
        return hidden_BLD.view_as(hidden_BLD)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Enter it."""
        ctx.times.enter_part(ctx.name)
        return gradient, None, None
