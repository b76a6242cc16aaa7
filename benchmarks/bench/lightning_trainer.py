"""Lightning's Trainer on pooled rows: one fit for each round, with the frozen batches in their order."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from bench.plain import Batch, Client, Workload


class _Module(LightningModule):
    """The loss of the other rivals, with frozen batches."""

    def __init__(self, client: Client) -> None:
        super().__init__()
        self.model, self.client = client.model, client
        self.sums: list[tuple[Tensor, int]] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """See ``LightningModule``."""
        loss = self.client.loss(batch)
        self.sums.append((loss.detach(), len(batch["targets"])))
        return loss

    def configure_optimizers(self) -> Any:
        """See ``LightningModule``."""
        return self.client.optimizer()

    def on_train_start(self) -> None:
        """See ``LightningModule``."""
        self.train()


class Rival:
    """See ``bench.rounds.Competitor``."""

    def __init__(self, workload: Workload) -> None:
        self.client = Client(workload)
        self.batches = [workload.batches(number, 0) for number in range(workload.settings["rounds"])]
        self.restart()

    def restart(self) -> None:
        """See ``Competitor``."""
        self.client.load(self.client.workload.initial)

    def round(self, round_index: int) -> list[float]:
        """See ``Competitor``."""
        module = _Module(self.client)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = Trainer(
                accelerator="cpu",
                devices=1,
                max_epochs=1,
                gradient_clip_val=self.client.workload.settings["gradient_clip"],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, DataLoader(self.batches[round_index], batch_size=None))
        targets = sum(count for _, count in module.sums)
        return [float(sum((loss * count for loss, count in module.sums), torch.tensor(0.0))) / targets]
