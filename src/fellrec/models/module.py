"""The LightningModule: a split backbone, a local objective and a ranker. It knows nothing of rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from lightning import LightningModule
from torch import Tensor, nn

from fellrec.data.guards import check_batch
from fellrec.data.prepared import Places
from fellrec.errors import ConfigError
from fellrec.functional.candidates import SampledCandidates
from fellrec.functional.first_items import first_items
from fellrec.functional.ranking import target_ranks
from fellrec.metrics.clients import ClientRankingMetrics, UserMetrics
from fellrec.models.split import SplitModel
from fellrec.models.streams import LayerStreams
from fellrec.types import Evaluation


class Objective(Protocol):
    """What a local objective provides; see ``RetrievalObjective`` for an example."""

    one_target_per_row: bool

    @property
    def metadata(self) -> dict[str, str]:
        """What of it is recorded with a run beside its settings."""

    def lengths(self, items: Tensor, is_target: Tensor) -> Tensor | None:
        """Tokens ``[B]`` of training rows ``[B, W + 1]``, whose batches then go by length; ``None`` if they do not."""

    def check(self, model: SplitModel) -> None:
        """Refuse a backbone that cannot serve this objective, before anything expensive starts."""

    def collate(self, items: Tensor, is_target: Tensor) -> dict[str, Tensor]:
        """Turn training rows ``[B, W + 1]`` into a batch."""

    def loss(self, model: SplitModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Sum of the negative log-likelihood over the batch's targets, and their number."""

    def inputs(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """What of a batch goes through the model: token ids ``[B, L]``, one tensor per forward pass.

        An encoder's padding is negative, see ``SplitModel.head``.
        """

    def loss_of(self, model: SplitModel, hidden: list[Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """``loss``, with the final hidden states ``[B, L, D]`` of ``inputs`` at hand."""


@runtime_checkable
class PreparesSteps(Protocol):
    """What an objective provides beside `Objective` if it keeps something from step to step; in one process only."""

    def prepare_step(self, model: SplitModel, round_index: int, step: int) -> None:
        """Called before every optimiser step of a client's round, both counted from 0, in the client's streams."""


@runtime_checkable
class DrawsForBatches(Protocol):
    """What an objective provides beside `Objective` if a loss depends on more random numbers than dropout's."""

    def draw(self, batch: dict[str, Tensor], streams: LayerStreams) -> dict[str, Tensor]:
        """The batch with what was drawn for it, such as a sample of items; ``loss`` does it by itself."""


@runtime_checkable
class MeasuresHistories(Protocol):
    """What an objective provides beside `Objective` if inputs of evaluation have other lengths than histories."""

    def history_lengths(self, histories: Tensor) -> Tensor:
        """Tokens ``[B]`` of the model's input for histories ``[B, H]``, by which users are batched."""


@runtime_checkable
class HasMembers(Protocol):
    """What the objective of a federation of data sets provides beside `Objective`."""

    def of_client(self, client: int | None) -> Objective:
        """The objective of a client's own data set; itself for pooled data (``None``) and public users (-1)."""


def drawn(objective: Objective, batch: dict[str, Tensor], streams: LayerStreams) -> dict[str, Tensor]:
    """The batch as ``inputs`` and ``loss_of`` want it; to be called once, in the client's streams."""
    return objective.draw(batch, streams) if isinstance(objective, DrawsForBatches) else batch


class Ranker(Protocol):
    """What turns a model and histories into one score per item; see ``SimilarityRanker`` for an example."""

    def refresh(self, model: SplitModel) -> None:
        """Prepare for the adapter that is in the model now."""

    def scores(self, model: SplitModel, histories: Tensor) -> Tensor:
        """Score all items, ``[B, I]`` float32, for histories ``[B, H]`` padded with -1 on the right."""


@runtime_checkable
class ReportingRanker(Ranker, Protocol):
    """A ranker that tells of each user more than scores, or that has a setting which validation is to choose.

    What it tells is gathered from all clients and processes with the users' metrics, so it need not add up anything.

    Attributes:
        reported: Names of the R values that it tells of each user.
        choices: The G values of the open setting, which ``scores`` gives ``[G, B, I]`` for; with none, ``[B, I]``.
    """

    reported: tuple[str, ...]
    choices: tuple[float, ...]

    def take_report(self) -> Tensor:
        """What there is to tell, ``[B, R]`` float64, of the users of the last call of ``scores``."""

    def figures(self, reported: Mapping[str, Tensor], choice: int) -> dict[str, float]:
        """Figures of one evaluation, for its summary.

        Args:
            reported: Name → ``[U]``, of all users.
            choice: Position in ``choices`` of the setting that the metrics were made with.
        """


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW's settings.

    Attributes:
        learning_rate: Step size.
        weight_decay: Decoupled weight decay.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.01

    def build(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """AdamW over these parameters."""
        return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)


class FellrecModule(LightningModule):
    """A recommender with one adapter in it, trainable by ``FederatedLoop`` and by ``lightning.Trainer`` alike.

    Args:
        model: The backbone, cut in head, body and tail, adapter attached.
        trainable: The adapter's parameters in the model, by name.
        objective: Local loss.
        ranker: Scores of all items.
        metrics: Accumulate every evaluated user's metrics, one for each of the ranker's choices; one if there are none.
        title_groups: ``[I]`` int64; items with the same title have the same number.
        optimizer: AdamW's settings.
        candidates: Draws what targets are ranked among, beside full ranking; ``None`` for full ranking alone.
        choice_metric: Name of the metric by whose mean over clients validation selects among the ranker's choices;
            ``None`` for the first.
        places: Where the members of a federation are in the data: a batch's users are ranked on the items of their own
            member. ``None`` if all users are ranked on all items.
    """

    def __init__(
        self,
        model: SplitModel,
        trainable: dict[str, nn.Parameter],
        objective: Objective,
        ranker: Ranker,
        metrics: Sequence[ClientRankingMetrics],
        title_groups: Tensor,
        optimizer: OptimizerSettings,
        candidates: SampledCandidates | None = None,
        choice_metric: str | None = None,
        places: Places | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.trainable = trainable
        self.objective = objective
        self.ranker = ranker
        # Registered as submodules, so they move to the model's device.
        self.metrics: Sequence[ClientRankingMetrics] = nn.ModuleList(metrics)  # type: ignore[assignment]
        self.title_groups = title_groups
        self.optimizer_settings = optimizer
        self.candidates = candidates
        self.choice_metric = choice_metric
        self.places = places
        self._choice: int | None = None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> dict[str, Any]:
        """The local loss of a batch, in ``lightning.Trainer`` and in a federated round alike.

        Returns:
            ``loss``, the mean over the batch's targets; ``loss_sum``, their sum, which a round divides by the targets
            of all batches of an optimiser step; ``num_targets``.
        """
        total, num_targets = self.objective.loss(self.model, batch)
        loss = total / num_targets
        if self._trainer is not None:
            self.log("train/loss", loss, prog_bar=True, batch_size=num_targets)
        return {"loss": loss, "loss_sum": total, "num_targets": num_targets}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over the adapter's trained parameters that are in the model now."""
        here = dict(self.model.model.named_parameters())  # a client with a short head has not all of the adapter
        parameters = [here[name] for name in self.trainable if name in here]
        return self.optimizer_settings.build([parameter for parameter in parameters if parameter.requires_grad])

    @torch.no_grad()
    def score_batch(self, batch: dict[str, Tensor], keep_rankings: bool = False) -> None:
        """Rank all items for the batch's users and add their metrics to ``self.metrics``.

        Call ``self.ranker.refresh(self.model)`` first whenever the adapter has changed.

        Args:
            batch: From ``FellrecDataModule.eval_loader``.
            keep_rankings: Whether ``self.metrics`` keeps the users' first items too.
        """
        scores = self.ranker.scores(self.model, batch["histories"])
        report = self.ranker.take_report() if isinstance(self.ranker, ReportingRanker) else None
        self.add_scores(scores, batch, report, keep_rankings)

    def add_scores(
        self, scores: Tensor, batch: dict[str, Tensor], report: Tensor | None = None, keep_rankings: bool = False
    ) -> None:
        """Add the metrics of the batch's users to ``self.metrics``.

        Args:
            scores: ``[B, I]``, from any ranker, or ``[G, B, I]`` for each of its choices. Of a federation, of the items
                of the users' member.
            batch: From ``FellrecDataModule.eval_loader``.
            report: ``[B, R]``, what ``self.ranker`` told of these users; ``None`` from other rankers.
            keep_rankings: As for ``score_batch``.

        Raises:
            TrainingError: If a score is NaN.
            LeakError: If a target is masked, or an item of a history is not, or an item is of another catalogue.
        """
        users, clients, titles, first_item = batch["users"], batch["clients"], self.title_groups, 0
        if self.places is not None:
            member = self.places.of_batch(batch["histories"])
            batch = self.places.local_batch(batch, member)
            first_item = self.places.items[member]
            titles = titles[first_item : self.places.items[member + 1]]
        check_batch(batch, scores.shape[-1])
        titles = titles.to(scores.device)
        targets = batch["target_rows"], batch["target_items"]
        masked = batch["masked_rows"], batch["masked_items"]
        drawn_BI = None
        if self.candidates is not None:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
            for rows, items in (masked, targets):
                allowed[rows, items] = False
            drawn_BI = self.candidates.draw(batch["users"], allowed)
        for metric, choice_BI in zip(self.metrics, scores if scores.dim() == 3 else scores[None], strict=False):
            scores_BI = choice_BI.float()
            ranks = target_ranks(scores_BI, *targets, *masked, titles)
            longest = max(metric.cutoffs)
            first = first_items(scores_BI, targets, masked, titles, longest) if keep_rankings else None
            if first is not None and first_item:
                first = first._replace(items=torch.where(first.items >= 0, first.items + first_item, -1))
            sampled = None if drawn_BI is None else target_ranks(scores_BI, *targets, *masked, titles, drawn_BI)
            metric.update(users, clients, ranks, targets[0], report, first, sampled)

    def take_users(self) -> tuple[UserMetrics, ...]:
        """The states of all metrics, which are reset: for ``add_users`` in another process."""
        return tuple(metric.take() for metric in self.metrics)

    def add_users(self, taken: Sequence[Sequence[Tensor]]) -> None:
        """Add what ``take_users`` returned in another process."""
        for metric, states in zip(self.metrics, taken, strict=True):
            metric.add(*states)

    @property
    def chooses_on_validation(self) -> bool:
        """Whether a setting of the ranker is open: a test then needs a validation of the same adapters before it."""
        return isinstance(self.ranker, ReportingRanker) and len(self.ranker.choices) > 1

    def finish_evaluation(self, stage: str, round_index: int) -> Evaluation:
        """Close the evaluation: gather the users of all processes, summarise, reset.

        A validation selects among the ranker's choices, if any; a test uses what the last validation selected.

        Raises:
            ConfigError: If there was no validation.
        """
        if not self.chooses_on_validation:
            return self._close(stage, round_index, 0)
        if stage != "test":
            self._choice = self._best_choice()
        elif self._choice is None:
            raise ConfigError("the ranker has a setting that validation selects, and there was no validation")
        return self._close(stage, round_index, self._choice)

    def finish_reference(self, stage: str) -> Evaluation:
        """The same after ``add_scores`` of another ranker, which has no choices."""
        return self._close(stage, -1, 0)

    def _best_choice(self) -> int:
        """The choice with the best mean over clients; the first of equals, and 0 without users."""
        name = self.choice_metric or self.metrics[0].names[0]
        means = [metric.compute()["per_client"][name].nanmean() for metric in self.metrics]
        return int(torch.stack(means).nan_to_num(nan=-torch.inf).argmax())

    def _close(self, stage: str, round_index: int, choice: int) -> Evaluation:
        evaluation = replace(self.metrics[choice].evaluation(stage, round_index), choice=choice)
        self._reset_metrics()
        if not isinstance(self.ranker, ReportingRanker) or _is_silent(evaluation.reported):
            return evaluation
        figures = self.ranker.figures(evaluation.reported, choice)
        return replace(evaluation, summary={**evaluation.summary, **figures})

    def _reset_metrics(self) -> None:
        for metric in self.metrics:
            metric.reset()

    def on_train_start(self) -> None:
        """Lightning's hook: dropout is on in training, whatever mode the backbone was loaded in."""
        self.train()

    def on_validation_epoch_start(self) -> None:
        """Lightning's hook."""
        self._reset_metrics()
        self.ranker.refresh(self.model)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> None:
        """Lightning's hook: see ``score_batch``."""
        self.score_batch(batch)

    def on_validation_epoch_end(self) -> None:
        """Lightning's hook: log ``val/ndcg_at_10/mean`` and the rest."""
        self._log_evaluation("val")

    on_test_epoch_start = on_validation_epoch_start

    def test_step(self, batch: dict[str, Tensor], batch_idx: int = 0) -> None:
        """Lightning's hook: see ``score_batch``."""
        self.score_batch(batch)

    def on_test_epoch_end(self) -> None:
        """Lightning's hook: log ``test/ndcg_at_10/mean`` and the rest."""
        self._log_evaluation("test")

    def _log_evaluation(self, stage: str) -> None:
        evaluation = self.finish_evaluation(stage, self.current_epoch)
        self.log_dict({f"{stage}/{name}": value for name, value in evaluation.summary.items()})


def _is_silent(reported: Mapping[str, Tensor]) -> bool:
    """Whether another ranker's scores were evaluated, or no user's."""
    return any(bool(values.isnan().all()) for values in reported.values())
