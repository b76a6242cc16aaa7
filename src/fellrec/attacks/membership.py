"""What an adapter says of its client's users: whether an interaction was trained on, and whose client a user is.

Shape letters: R rows, W items of a row before its target.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from lightning import Fabric
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from fellrec.data.prepared import PreparedData
from fellrec.federated.client_model import ClientModel
from fellrec.federated.records import ScoreJob
from fellrec.models.module import FellrecModule

Losses = NDArray[np.float64]


def known_users(data: PreparedData, most: int, seed: int) -> NDArray[np.int64]:
    """Drawn users of clients whose last training interaction is a target, and who have a validation target, ascending.

    Args:
        data: The prepared data.
        most: Users, as far as there are so many.
        seed: Of the draw.
    """
    is_last_target = np.zeros(len(data.users), dtype=bool)
    has_train = data.train.lengths > 1
    is_last_target[has_train] = data.train_targets[data.train.offsets[1:][has_train] - 1]
    users = np.flatnonzero((data.client_of_user >= 0) & is_last_target & (data.valid.lengths > 0))
    return np.sort(np.random.default_rng(seed).permutation(users)[:most])


def rows_of(data: PreparedData, users: NDArray[np.int64], is_member: bool) -> Tensor:
    """A history and its next item of each user, ``[R, W + 1]`` int64, padded with -1 on the right.

    Args:
        data: The prepared data.
        users: Of `known_users`.
        is_member: Whether the next item is the last one of training, or the first one of validation, which no training
            has seen.
    """
    train = data.train.take(users)
    rows = []
    for place, user in enumerate(users):
        items = train.row(place) if is_member else np.append(train.row(place), data.valid.row(int(user))[0])
        rows.append(torch.from_numpy(np.asarray(items[-data.max_history - 1 :])))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


@torch.no_grad()
def row_losses(
    module: FellrecModule, model: ClientModel, job: ScoreJob, items: Tensor, fabric: Fabric, seed: int
) -> Losses:
    """The loss of the last item of each row under an adapter, ``[R]`` float64, without dropout.

    Args:
        module: The recommender; its objective computes the loss.
        model: Puts adapters into it.
        job: The adapter.
        items: ``[R, W + 1]`` of `rows_of`.
        fabric: Device and precision.
        seed: Of the sample of items, if the objective draws one.
    """
    module.eval()
    losses = []
    with model.evaluating(job, "test", 0), fabric.autocast(), torch.random.fork_rng(devices=[]):
        for row in items:
            own = row[row >= 0][None]
            is_target = torch.zeros_like(own, dtype=torch.bool)
            is_target[:, -1] = True
            torch.default_generator.manual_seed(seed)
            total, count = module.objective.loss(
                module.model, fabric.to_device(module.objective.collate(own, is_target))
            )
            losses.append(float(total) / count)
    return np.array(losses)


def member_auc(of_members: Losses, of_others: Losses) -> float:
    """Area under the ROC curve of telling members from others by a smaller loss; 0.5 is chance.

    Example:
        >>> member_auc(np.array([0.1, 0.4]), np.array([0.3, 0.9]))
        0.75
    """
    labels = np.repeat([1, 0], [len(of_members), len(of_others)])
    return float(roc_auc_score(labels, -np.concatenate([of_members, of_others])))


def client_figures(losses: Mapping[int, Losses], owner: NDArray[np.int64]) -> dict[str, float]:
    """How well the client of a user is told by the adapter with the smallest loss on the user's interactions.

    Args:
        losses: Client → ``[R]`` loss of each user under its adapter.
        owner: ``[R]`` the user's client.

    Returns:
        ``client_at_1``, and ``client_auc``: of telling each user's own client from the others, by the loss relative to
        the user's mean over clients.

    Example:
        >>> client_figures({0: np.array([0.1, 0.5]), 1: np.array([0.3, 0.2])}, np.array([0, 1]))
        {'client_at_1': 1.0, 'client_auc': 1.0}
    """
    clients = np.array(list(losses))
    table = np.stack([losses[client] for client in clients], axis=1)
    relative = table - table.mean(axis=1, keepdims=True)
    is_own = owner[:, None] == clients
    guessed = clients[table.argmin(axis=1)]
    return {
        "client_at_1": float((guessed == owner).mean()),
        "client_auc": float(roc_auc_score(is_own.ravel(), -relative.ravel())),
    }
