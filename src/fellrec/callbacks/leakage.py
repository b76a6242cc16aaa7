"""What a server could recover from the clients' hidden states, after each validated round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch

from fellrec.attacks.findings import token_metrics
from fellrec.attacks.observe import Observed, groups_of
from fellrec.attacks.on_cut import ON_TOKENS
from fellrec.attacks.public import Public, public_item_counts, public_texts, token_counts
from fellrec.attacks.settings import AttackSettings
from fellrec.attacks.titles import title_numbers
from fellrec.data.datamodule import FellrecDataModule
from fellrec.errors import ConfigError
from fellrec.federated.base_change import BaseWeights
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.client_model import WholeClientModel
from fellrec.federated.population import Population
from fellrec.federated.records import FitStart, ScoreJob
from fellrec.federated.slot_state import SlotState
from fellrec.functional.packing import pack, unpack
from fellrec.functional.ranges import Count, distinct
from fellrec.models.split import SplitModel
from fellrec.types import Evaluation

CHEAP = ("nearest_embedding", "logit_lens")
"""Attacks that take about as long as a forward pass of the head."""


class Leakage(FederatedCallback):
    """Logs what attacks on the first cut recover, beside the metrics of the same validation.

    ``leakage/nearest_embedding/token_at_1`` and so on, as in docs/attacks.md, from the hidden states of the first
    training rows of the first clients at the run's own ``split.head_layers`` (the smallest, if clients differ), with
    their adapters of that round, as ``split.hidden_dtype`` rounds them, but without dropout, clipping
    and noise.

    Args:
        recommender: Of the run.
        population: Has the clients' adapters.
        config: Of the run.
        attacks: Some of ``nearest_embedding`` and ``logit_lens``.
        rows: Training rows, spread evenly over clients.

    Raises:
        ConfigError: If the backbone reads item ids, or the data are a federation of data sets.
    """

    def __init__(
        self,
        recommender: Any,
        population: Population,
        config: Any,
        attacks: Annotated[Sequence[str], distinct(CHEAP)] = CHEAP,
        rows: Count = 32,
    ) -> None:
        if config.backbone.name == "sasrec" or recommender.data.members:
            raise ConfigError(
                "callbacks.leakage recovers text: it needs backbone=tiny or backbone=hf, and one data set"
            )
        self.attacks = attacks
        self.rows = rows
        self.population = population
        self._recommender = recommender
        self._seed = int(config.seed)
        self._packing = config.split.hidden_dtype if config.split.transport != "none" else "float32"
        cuts = recommender.module.model.cuts
        self._depth = min(cuts)
        # The attacker's, with a cut at 0, where the embeddings are; layers are shared with the clients' model.
        self._model = SplitModel(recommender.backbone.model, {0, self._depth}, config.split.tail_layers)
        self._batches: dict[int, dict[str, torch.Tensor]] = {}

    def on_fit_start(self, fit: FitStart) -> None:
        """Take the same rows of the same clients for the whole run."""
        data: FellrecDataModule = self._recommender.datamodule
        clients = [client for client in range(data.data.num_clients) if data.num_samples(client)][: self.rows]
        for client in clients:
            rows: Any = data.train_loader(client, self._seed).dataset
            some = list(range(min(len(rows), max(1, self.rows // len(clients)))))
            items, is_target = rows.__getitems__(some)
            self._batches[client] = {**data.collate(items, is_target), "of": items}

    def on_evaluate_end(self, evaluation: Evaluation) -> None:
        """Attack the adapters that were validated."""
        if evaluation.stage != "val" or evaluation.round_index < 0 or not self._batches:
            return
        module, data = self._recommender.module, self._recommender.datamodule
        base: BaseWeights = self._recommender.base
        holder = WholeClientModel(module, base)
        module.eval()
        jobs = {client: job for job in self.population.score_jobs() for client in job.clients}
        observed = [self._observed(holder, jobs[client], client) for client in self._batches]
        counts, texts = public_item_counts(data.data), public_texts(data, self._seed)
        frequent = token_counts(module.objective, counts, self._model.num_embeddings)
        public = Public(self._model, module.objective, counts, frequent, texts, self._seed)
        tokenizer, num = self._recommender.backbone.tokenizer, min(10, len(frequent))
        with torch.no_grad(), self._holding(holder, ScoreJob(0, self.population.initial, (0,))):
            for name in self.attacks:
                attack = ON_TOKENS[name](public, AttackSettings())
                with self._recommender.fabric.autocast():
                    guesses = [[attack.tokens(hidden, num) for hidden in one.first] for one in observed]
                for metric, value in token_metrics(guesses, observed, tokenizer, num).items():
                    self.log_metric(f"leakage/{name}/{metric}", value)

    def _observed(self, holder: WholeClientModel, job: ScoreJob, client: int) -> Observed:
        batch = self._recommender.fabric.to_device(self._batches[client])
        ids, rows = groups_of(batch)
        with (
            torch.no_grad(),
            self._holding(holder, job),
            self._model.at_depth(self._depth),
            self._recommender.fabric.autocast(),
        ):
            heads = [self._model.head(some) for some in ids]
        sent = [unpack(pack(head, self._packing), torch.float32, head.device) for head in heads]
        objective = self._recommender.module.objective
        titles = [title_numbers(objective, some, batch["of"][own]) for some, own in zip(ids, rows, strict=True)]
        return Observed(client, sent, [], [], [], ids, titles, batch)

    def _holding(self, holder: WholeClientModel, job: ScoreJob) -> Any:
        """The parameters of a job that are in this process, in the model."""
        holder.use_base(job.base)
        adapter = job.adapter.tensors()
        own = {name: adapter[name] for name in self._recommender.module.trainable}
        return holder.holding(SlotState(own, trains=()))
