"""The factors of a round, layer by layer, for the rules that read both."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fellrec.federated.records import LoraLayer, Updates


def factors(updates: Updates) -> Iterator[tuple[LoraLayer, Tensor, Tensor]]:
    """The layers that LoRA adapts, each with the clients' A ``[N, r, in]`` and B ``[N, out, r]``, float64."""
    for layer in updates.layers:
        yield layer, updates.end[layer.a].double(), updates.end[layer.b].double()
