"""Attacks on updates and adapters of a finished run, for which the model need not be cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from omegaconf import DictConfig
from torch import Tensor

from fellrec.attacks import ON_UPDATE
from fellrec.attacks.findings import Finding
from fellrec.attacks.membership import client_figures, known_users, member_auc, row_losses, rows_of
from fellrec.attacks.public import public_item_counts
from fellrec.attacks.settings import AttackSettings
from fellrec.attacks.update import UpdateRows, UpdateScores, update_recall, with_clients
from fellrec.errors import ConfigError
from fellrec.experiment.build import Recommender, build_datamodule
from fellrec.experiment.federation import Federation
from fellrec.federated.client_model import WholeClientModel
from fellrec.federated.executor import SerialExecutor
from fellrec.federated.local import LocalTrainer
from fellrec.federated.records import ScoreJob
from fellrec.state.tensor_store import StoredTensors


def attack_whole(
    config: DictConfig,
    recommender: Recommender,
    federation: Federation,
    names: Sequence[str],
    settings: AttackSettings,
) -> list[Finding]:
    """The findings of attacks on updates and adapters.

    Args:
        config: Of the run, as it was restored.
        recommender: Whole, in this process.
        federation: Of the run.
        names: Of attacks in ``ON_UPDATE`` and ``ON_ADAPTER``.
        settings: How much is attacked.

    Raises:
        ConfigError: If the clients of ``client_inference`` have one adapter.
    """
    jobs = {client: job for job in federation.selection.score_jobs() for client in job.clients}
    if "client_inference" in names and len({id(job.adapter) for job in jobs.values()}) < 2:
        raise ConfigError(
            "attack=client_inference compares the adapters of clients, and this run has selected one adapter for all"
        )
    findings: list[Finding] = []
    if on_update := [name for name in names if name in ON_UPDATE]:
        findings += _of_updates(config, recommender, federation, on_update, settings)
    if {"membership", "client_inference"} & set(names):
        findings += _of_adapters(recommender, federation, jobs, names, settings)
    return findings


def _of_adapters(
    recommender: Recommender,
    federation: Federation,
    jobs: dict[int, ScoreJob],
    names: Sequence[str],
    settings: AttackSettings,
) -> Iterator[Finding]:
    """The findings of attacks on the selected adapters."""
    module, data, fabric = recommender.module, recommender.data, recommender.fabric
    assert isinstance(federation.executor, SerialExecutor)
    model, seed = WholeClientModel(module, recommender.base), federation.executor.trainer.seed
    users = known_users(data, settings.users, seed)
    if not len(users):
        raise ConfigError("no user of a client has both a training target and a validation target: nothing to compare")
    owner = data.client_of_user[users]
    trained, unseen = rows_of(data, users, is_member=True), rows_of(data, users, is_member=False)

    def losses(job: ScoreJob, items: Tensor) -> np.ndarray:
        """The loss of each row."""
        return row_losses(module, model, job, items, fabric, seed)

    if "membership" in names:
        of_members, of_others = np.zeros(len(users)), np.zeros(len(users))
        for client in np.unique(owner):
            own = owner == client
            of_members[own], of_others[own] = (losses(jobs[client], items[own]) for items in (trained, unseen))
        yield Finding("membership", {"member_auc": member_auc(of_members, of_others)})
        before = ScoreJob(0, federation.population.initial, (0,))
        first_members, first_others = losses(before, trained), losses(before, unseen)
        calibrated = member_auc(of_members - first_members, of_others - first_others)
        yield Finding("membership_calibrated", {"member_auc": calibrated})
        yield Finding("initial_model", {"member_auc": member_auc(first_members, first_others)})
    if "client_inference" in names:
        yield Finding("client_inference", client_figures({c: losses(jobs[c], trained) for c in sorted(jobs)}, owner))
        largest = float(np.bincount(owner).max() / len(owner))
        yield Finding("largest_client", {"client_at_1": largest, "client_auc": 0.5})


def _of_updates(
    config: DictConfig,
    recommender: Recommender,
    federation: Federation,
    names: Sequence[str],
    settings: AttackSettings,
) -> Iterator[Finding]:
    """The findings of attacks on first updates, by number of users a client."""
    assert isinstance(federation.executor, SerialExecutor)
    module, initial = recommender.module, federation.population.initial
    own, model = federation.executor.trainer, WholeClientModel(recommender.module, recommender.base)
    attacks: dict[str, Callable[[StoredTensors], Tensor]] = {}
    if "update_rows" in names:
        rows = UpdateRows(module, initial.tensors())
        attacks["update_rows"] = lambda adapter: rows.scores(adapter.tensors())
    if "update_scores" in names:
        attacks["update_scores"] = UpdateScores(module, model, initial, recommender.data, own.seed).scores
    popularity = public_item_counts(recommender.data)
    attacks["most_popular"] = lambda adapter: popularity
    for number in settings.users_per_client:
        data = with_clients(recommender.data, number, settings.update_clients, own.seed)
        if data.num_clients:
            batches = build_datamodule(config, data, module.objective)
            trainer = LocalTrainer(own.fabric, module, batches, model, own.settings, own.seed)
            for name, recall in update_recall(trainer, initial, attacks).items():
                yield Finding(name, {"item_recall": recall}, users_per_client=number)
