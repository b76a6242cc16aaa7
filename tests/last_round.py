"""A callback that exports what a run has after its last round, and keeps the logits that the model then gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fellrec.federated.callback import FederatedCallback
from fellrec.federated.client_model import WholeClientModel
from fellrec.federated.records import RoundRecord, ScoreJob

IDS = torch.arange(3, 30).reshape(3, 9)


class ExportsTheLast(FederatedCallback):
    """Exports the first client's adapter after the last round, whatever validation selects, and keeps its logits."""

    logits: torch.Tensor
    start: torch.Tensor

    def __init__(self, run_dir: Path, population: Any, recommender: Any, save_adapter: Callable[..., None]) -> None:
        self.folder = run_dir / "last" / "adapter"
        self.population, self.recommender, self.save_adapter = population, recommender, save_adapter

    def on_round_end(self, record: RoundRecord) -> None:
        if record.is_last:
            kind, population = type(self), self.population
            kind.logits = self._logits(population.bank.versions[0], population.base)
            kind.start = self._logits(population.initial, ())
            self.save_adapter(population.bank.row(0), population.base, self.folder)

    @torch.no_grad()
    def _logits(self, adapter: Any, base: Any) -> torch.Tensor:
        recommender = self.recommender
        model = WholeClientModel(recommender.module, recommender.base)
        recommender.module.eval()
        with model.evaluating(ScoreJob(0, adapter, (0,), base), "val", 0):
            found: torch.Tensor = recommender.backbone.model(input_ids=IDS, use_cache=False).logits
        return found
