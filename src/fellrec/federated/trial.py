"""One training step that changes nothing, to measure what a step takes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning import Fabric
from torch import Tensor

from fellrec.data.datamodule import FellrecDataModule
from fellrec.errors import DataError
from fellrec.models.module import FellrecModule, PreparesSteps
from fellrec.models.streams import StreamPosition, training_seed


def first_batch(datamodule: FellrecDataModule, seed: int) -> dict[str, Tensor]:
    """The first batch of the first client that has training rows.

    Raises:
        DataError: If there is none.
    """
    for client in range(datamodule.data.num_clients):
        if datamodule.num_batches(client):
            found: dict[str, Tensor] = next(iter(datamodule.train_loader(client, seed)))
            return found
    raise DataError("no client has a training row")


def trial_step(fabric: Fabric, module: FellrecModule, batch: Mapping[str, Tensor], seed: int) -> float:
    """Forward and backward pass of a batch; gradients are dropped, and no random number of the run is drawn.

    Args:
        fabric: Precision.
        module: What is trained.
        batch: On the device.
        seed: Of the run; all trials draw the same dropout.

    Returns:
        The loss.
    """
    module.train()
    position = StreamPosition(training_seed(seed, 0, 0))
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), module.model.streams.using(position):
        torch.default_generator.manual_seed(position.seed)
        if isinstance(module.objective, PreparesSteps):
            with fabric.autocast():
                module.objective.prepare_step(module.model, 0, 0)
        with fabric.autocast():
            loss: Tensor = module.training_step(dict(batch), 0)["loss"]
        fabric.backward(loss)
    module.zero_grad()
    return float(loss.detach())
