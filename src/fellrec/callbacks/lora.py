"""What LoRA's factors lose in an average, whatever the rule of the run does with them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import LoraLayer, RoundRecord, Trained
from fellrec.functional.lora import factor_error
from fellrec.tracking.run_log import RunLog


class FactorError(FederatedCallback):
    """Logs ``aggregation/factor_error`` of every round with LoRA: how far ``B̄ Ā`` is from ``Σ p_k B_k A_k``.

    The means are those by number of training targets, over the adapters as clients trained them, also where they do
    not leave their clients. 0 where a factor is the same for all. Not logged where the mean of products is 0.

    Args:
        log: Of the run.
        layers: The layers that LoRA adapts, as far as this process knows them.
        every: Rounds between two values.
    """

    def __init__(self, log: RunLog, layers: Sequence[LoraLayer], every: int = 1) -> None:
        self.log = log
        self.layers = layers
        self.every = every

    def on_round_end(self, record: RoundRecord) -> None:
        """Compute it from the adapters that were aggregated."""
        rows = set(record.clients)
        trained = [t for t in record.trained if t.row in rows]
        samples = torch.tensor([t.num_samples for t in trained], dtype=torch.float64)
        if record.round_index % self.every or not self.layers or not samples.sum():
            return
        error = factor_error(_layers(self.layers, trained), samples / samples.sum())
        if math.isfinite(error):
            self.log.log_metrics({"aggregation/factor_error": error}, record.round_index, once="factor_error")


def _layers(layers: Sequence[LoraLayer], trained: Sequence[Trained]) -> Iterator[tuple[float, Tensor, Tensor]]:
    adapters = [t.adapter.tensors() for t in trained]
    for layer in layers:
        a, b = (torch.stack([adapter[name].double() for adapter in adapters]) for name in (layer.a, layer.b))
        yield layer.scale, a, b
