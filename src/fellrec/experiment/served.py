"""Recommendations of a client's model: the next items after a history."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Fabric
from omegaconf import DictConfig

from fellrec.cut.settings import UNCHANGED
from fellrec.data.partition import user_item_matrix
from fellrec.data.prepared import PreparedData
from fellrec.data.ragged import Ragged
from fellrec.data.schema import Catalogue
from fellrec.data.titles import check_client, items_of
from fellrec.errors import ConfigError, DataError
from fellrec.experiment.restore import restore
from fellrec.federated.base_change import BaseWeights
from fellrec.federated.client_model import WholeClientModel
from fellrec.federated.records import ScoreJob
from fellrec.models.module import FellrecModule

_FACTORS = 32
"""Factors of users by which a new user's client is chosen, as in ``partition=kmeans``."""


@dataclass(frozen=True)
class Recommended:
    """One recommended item.

    Attributes:
        rank: From 1.
        item_id: Of the data set.
        title: Of the item.
        score: Of the ranker; higher is better, and comparable within one list only.
    """

    rank: int
    item_id: str
    title: str
    score: float


class ServedModel:
    """The models of all clients of a run, one of which ranks at a time.

    Args:
        module: The recommender.
        base: Its frozen weights.
        fabric: Device and precision.
        data: Its catalogue, and what histories may be.
        jobs: The adapter of each client.

    Raises:
        ConfigError: If the ranker has a setting that only a validation can choose.
    """

    def __init__(
        self, module: FellrecModule, base: BaseWeights, fabric: Fabric, data: PreparedData, jobs: Sequence[ScoreJob]
    ) -> None:
        if module.chooses_on_validation:
            raise ConfigError("ranker.gamma has several values, of which validation chooses one: give the run one")
        self.module = module
        self.fabric = fabric
        self.data = data
        self.jobs = {client: job for job in jobs for client in job.clients}
        self._model = WholeClientModel(module, base)

    @classmethod
    def of_run(cls, run_dir: Path, config: DictConfig, data: PreparedData | None = None) -> ServedModel:
        """That of a finished run, whole in this process: what is sent through a cut is not rounded; see `restore`."""
        config.split.update(UNCHANGED)
        recommender, federation = restore(run_dir, config, data)
        jobs = federation.selection.score_jobs()
        return cls(recommender.module, recommender.base, recommender.fabric, recommender.data, jobs)

    def recommend(self, client: int, history: Sequence[str], k: int) -> list[Recommended]:
        """The items that a client's model ranks first after a history, without those of the history.

        Args:
            client: Whose model, from 0.
            history: Titles, oldest first; the last ``data.max_history`` of them go into the model.
            k: Length of the list, at least 1.

        Raises:
            ConfigError: If there is no such client, or k is not allowed.
            DataError: If the history is empty or a title is not in the catalogue.
        """
        items = check_request(self.data, client, history, k)
        catalogue, first = catalogue_of(self.data, client)
        scores = self._scores(client, [item + first for item in items])
        if not self.data.ranks_seen:
            scores[items] = -np.inf
        order = np.argsort(-scores, kind="stable")[:k]
        return [
            Recommended(rank, catalogue.item_ids[item], catalogue.titles[item], float(scores[item]))
            for rank, item in enumerate(order[np.isfinite(scores[order])].tolist(), start=1)
        ]

    @torch.no_grad()
    def _scores(self, client: int, items: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Scores of all items of the client's catalogue, ``[I]``."""
        histories = self.fabric.to_device(torch.tensor([items[-self.data.max_history :]]))
        module = self.module.eval()
        with self._model.evaluating(self.jobs[client], "test", 0), self.fabric.autocast():
            module.ranker.refresh(module.model)
            return module.ranker.scores(module.model, histories)[0].float().cpu().numpy()


def check_request(data: PreparedData, client: int, history: Sequence[str], k: int) -> list[int]:
    """The items of a history in the client's catalogue; see `ServedModel.recommend`."""
    check_client(client, data.num_clients)
    catalogue, _ = catalogue_of(data, client)
    num_items = len(catalogue)
    if not 1 <= k <= num_items:
        raise ConfigError(f"k={k} is not allowed: a whole number from 1 to {num_items}, the number of items")
    if not history:
        raise DataError("the history is empty: give at least one title")
    return items_of(history, catalogue)


def catalogue_of(data: PreparedData, client: int) -> tuple[Catalogue, int]:
    """The items that a client ranks, and the number of the first one among all items of the data."""
    place = data.places.of_client(client)
    own = list(data.members.values())[place] if data.members else data
    return own.catalogue, data.places.items[place]


def nearest_client(data: PreparedData, items: Sequence[int]) -> int:
    """The client whose users are nearest to a history: by cosine to the mean of their normalised factors.

    Factors are those of a truncated SVD of the clients' training interactions, as for ``partition=kmeans``; they are
    computed centrally, which is part of the simulation.

    Args:
        data: The prepared data.
        items: The history.

    Raises:
        DataError: If there are too few users or items for factors.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.preprocessing import normalize

    private = np.flatnonzero(data.client_of_user >= 0)
    matrix, num_items = user_item_matrix(data.train.take(private), len(data.catalogue)), len(data.catalogue)
    if min(matrix.shape) < 2:
        raise DataError("the nearest client needs at least two users and two items: give --client")
    factors = TruncatedSVD(min(_FACTORS, min(matrix.shape) - 1), random_state=0)
    users = normalize(factors.fit_transform(matrix))
    owner = data.client_of_user[private]
    centres = normalize(np.stack([users[owner == client].mean(axis=0) for client in range(data.num_clients)]))
    own = normalize(factors.transform(user_item_matrix(Ragged.from_rows([list(items)]), num_items)))
    return int((centres @ own[0]).argmax())
