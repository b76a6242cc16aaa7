"""Ranking of clients' users with an adapter, and the evaluation that it adds up to."""

from __future__ import annotations

from lightning import Fabric

from fellrec.data.datamodule import FellrecDataModule
from fellrec.federated.client_model import ClientModel
from fellrec.federated.records import ScoreJob
from fellrec.models.module import FellrecModule
from fellrec.types import Evaluation


class Evaluator:
    """Ranks all items for the users of clients.

    Args:
        fabric: Device and precision.
        module: The recommender, with ranker and metrics.
        datamodule: Users by client.
        model: Puts adapters into the module.
    """

    def __init__(
        self, fabric: Fabric, module: FellrecModule, datamodule: FellrecDataModule, model: ClientModel
    ) -> None:
        self.fabric = fabric
        self.module = module
        self.datamodule = datamodule
        self.model = model

    def stages_before(self, stage: str) -> tuple[str, ...]:
        """The stages to be scored for an evaluation, itself included: validation chooses a ranker's open setting."""
        return ("val", "test") if stage == "test" and self.module.chooses_on_validation else (stage,)

    def score(
        self, job: ScoreJob, stage: str, round_index: int, part: int = 0, num_parts: int = 1, is_new: bool = True
    ) -> None:
        """Add the metrics of a job's users to ``module.metrics``.

        Args:
            job: Adapter and clients.
            stage: ``"val"`` or ``"test"``.
            round_index: The round that the adapter comes from.
            part: Which of ``num_parts`` parts; batches are dealt out and never divided, so no figure changes.
            num_parts: Processes among which the job is divided.
            is_new: Whether the adapter is another one than at the last call.
        """
        self.module.eval()
        with self.model.evaluating(job, stage, round_index), self.fabric.autocast():
            if is_new:
                self.module.ranker.refresh(self.module.model)
            for number, batch in enumerate(self.datamodule.eval_loader(stage, job.clients)):
                if number % num_parts == part:
                    self.module.score_batch(self.fabric.to_device(batch), keep_rankings=stage == "test")

    def finish(self, stage: str, round_index: int) -> Evaluation:
        """Close an evaluation."""
        return self.module.finish_evaluation(stage, round_index)
