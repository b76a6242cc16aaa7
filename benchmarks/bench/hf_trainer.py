"""Transformers' Trainer on pooled rows: one fit for each round, with the frozen batches in their order."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments

from bench.plain import Batch, Client, Workload


class _Trainer(Trainer):
    """Batches are frozen, and the loss is that of the other rivals."""

    def __init__(self, client: Client, batches: list[Batch], arguments: TrainingArguments) -> None:
        super().__init__(
            model=client.model, args=arguments, train_dataset=batches, data_collator=lambda rows: dict(rows[0])
        )
        self.client = client
        self.sums: list[tuple[Tensor, int]] = []

    def compute_loss(self, model: nn.Module, inputs: Batch, *_: Any, **__: Any) -> Tensor:
        """See ``Trainer``."""
        loss = self.client.loss(inputs)
        self.sums.append((loss.detach(), len(inputs["targets"])))
        return loss

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


class Rival:
    """See ``bench.rounds.Competitor``."""

    def __init__(self, workload: Workload) -> None:
        self.client, how = Client(workload), workload.settings
        self.place = tempfile.TemporaryDirectory()
        self.arguments = TrainingArguments(
            output_dir=self.place.name,
            per_device_train_batch_size=1,
            num_train_epochs=1,
            learning_rate=how["learning_rate"],
            weight_decay=how["weight_decay"],
            max_grad_norm=how["gradient_clip"],
            lr_scheduler_type="constant",
            optim="adamw_torch",
            adam_beta2=0.999,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_num_workers=0,
            use_cpu=True,
        )
        self.batches = [workload.batches(number, 0) for number in range(how["rounds"])]
        self.restart()

    def restart(self) -> None:
        """See ``Competitor``."""
        self.client.load(self.client.workload.initial)

    def round(self, round_index: int) -> list[float]:
        """See ``Competitor``."""
        trainer = _Trainer(self.client, self.batches[round_index], self.arguments)
        trainer.train()
        targets = sum(count for _, count in trainer.sums)
        return [float(sum((loss * count for loss, count in trainer.sums), torch.tensor(0.0))) / targets]
