"""The results of runs: with what they are compared, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from fellrec.config.instantiate import settings
from fellrec.data.prepared import PreparedData
from fellrec.errors import shorten
from fellrec.experiment.build import Recommender
from fellrec.experiment.run_dir import provenance
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.records import FitResult
from fellrec.rankers.members import MembersReference
from fellrec.rankers.reference import ReferenceRanker, reference_rankers
from fellrec.rankers.settings import PRETRAINED, ReferenceSettings
from fellrec.report.comparison import Comparison, RuleResult
from fellrec.types import Evaluation

_MOST_LINES = 10
"""Rounds that a message names."""


def failure_message(result: FitResult) -> str:
    """Which clients did not finish the first of the rounds that some did not finish, for people; empty if all did."""
    rounds = list(result.failed_clients.items())
    lines = [
        f"Round {round_index} was aggregated without clients {shorten(', '.join(map(str, clients)))}."
        for round_index, clients in rounds[:_MOST_LINES]
    ]
    if more := len(rounds) - len(lines):
        lines.append(f"{more} more rounds were aggregated without some clients: results.json has all of them.")
    return "\n".join(lines)


def collect(recommender: Recommender, results: Sequence[RuleResult], run_dir: Path | None = None) -> Comparison:
    """Results with the number of users that they were evaluated on, and what they were measured with.

    Args:
        recommender: What was evaluated.
        results: Of its rules and reference rankers.
        run_dir: Of the one run that they are of; ``None`` for runs that began in this process.
    """
    data, evaluation = recommender.data, results[0].evaluation
    users_per_client = torch.bincount(evaluation.client_of_user, minlength=data.num_clients).tolist()
    cold = recommender.cold.counts(evaluation.users.numpy())
    return Comparison(
        data.name,
        users_per_client,
        len(data.catalogue),
        results,
        cold=cold,
        provenance=provenance(run_dir),
        members=clients_and_items(data),
    )


def clients_and_items(data: PreparedData) -> dict[str, dict[str, Any]]:
    """The clients of each member of a federation, and the number of items that they rank; empty for one data set."""
    bounds = data.places.clients
    return {
        name: {"clients": list(range(bounds[place], bounds[place + 1])), "items": len(own.catalogue)}
        for place, (name, own) in enumerate(data.members.items())
    }


def reference_results(
    config: DictConfig, recommender: Recommender, loop: FederatedLoop, stage: str = "test"
) -> list[RuleResult]:
    """The reference rankers that ``references.show`` names, and the backbone before any round, on the same users."""
    data, seed = recommender.data, config.seed
    shown = settings(ReferenceSettings, config.references, "references")
    rankers = _reference_rankers(data, shown, seed)
    results = [
        RuleResult(name, seed, "reference", _evaluate(recommender, ranker, stage)) for name, ranker in rankers.items()
    ]
    if PRETRAINED in shown.show:
        name = PRETRAINED if recommender.backbone.is_pretrained else "untrained"
        results.append(RuleResult(name, seed, "reference", loop.evaluate_start(stage)))
    return results


def _reference_rankers(data: PreparedData, shown: ReferenceSettings, seed: int) -> dict[str, ReferenceRanker]:
    """Fitted to the data, or to each member of a federation by itself."""
    parts = [
        reference_rankers(own.train, own.client_of_user, len(own.catalogue), shown, seed)
        for own in (data.members or {data.name: data}).values()
    ]
    if not data.members:
        return parts[0]
    return {name: MembersReference([rankers[name] for rankers in parts], data.places) for name in parts[0]}


def _evaluate(recommender: Recommender, ranker: ReferenceRanker, stage: str) -> Evaluation:
    module = recommender.module
    with torch.no_grad():  # in float32, whatever the model's precision
        for batch in recommender.datamodule.eval_loader(stage):
            moved = recommender.fabric.to_device(batch)
            module.add_scores(ranker.scores(moved["histories"], moved), moved)
    return module.finish_reference(stage)
