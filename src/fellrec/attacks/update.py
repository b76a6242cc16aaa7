"""What an update says of a client's users: which items it was trained on.

Shape letters: V tokens, D hidden size, I items, B histories.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fellrec.attacks.titles import texts_of
from fellrec.data.prepared import PreparedData
from fellrec.federated.client_model import ClientModel
from fellrec.federated.local import LocalTrainer
from fellrec.federated.records import Job, ScoreJob
from fellrec.models.module import FellrecModule
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import PUBLIC, Adapter

_MOST_HISTORIES = 64
"""Public histories on which models are compared."""


def with_clients(data: PreparedData, users_per_client: int, most_clients: int, seed: int) -> PreparedData:
    """The same data with other clients: drawn groups of so many private users; all others are in no client.

    Args:
        data: The prepared data.
        users_per_client: Of each client.
        most_clients: As many clients as there are users for, at most these.
        seed: Of the draw.
    """
    private = np.flatnonzero((data.client_of_user != PUBLIC) & (data.train.lengths > 1))
    order = np.random.default_rng(seed).permutation(private)
    number = min(most_clients, len(order) // users_per_client)
    owner = np.full(len(data.users), PUBLIC, dtype=np.int64)
    owner[order[: number * users_per_client]] = np.repeat(np.arange(number), users_per_client)
    return replace(data, client_of_user=owner, num_clients=number)


def items_of(data: PreparedData, client: int) -> NDArray[np.int64]:
    """The distinct items of a client's training interactions."""
    return np.unique(data.train.take(np.flatnonzero(data.client_of_user == client)).values)


def first_update(trainer: LocalTrainer, client: int, initial: StoredTensors) -> StoredTensors:
    """The adapter after a client's first round; the server has it, and the initial one."""
    return trainer.train(Job(client, client, 0, 0, initial), lambda loss: None).adapter


class UpdateRows:
    """Guesses the items whose rows of the embedding moved unlike the others.

    The score of a token is ‖Δ_v - median(Δ)‖, where Δ_v is how its row moved, of all tokens of the catalogue. A softmax
    over all items moves every row, nearly alike; rows of inputs and targets move in other directions. The score of an
    item is the mean over the tokens of its text, the only one for item ids.

    Args:
        module: The recommender; its token embedding must be trained.
        initial: The adapter before the update.
    """

    def __init__(self, module: FellrecModule, initial: Adapter) -> None:
        weight = module.model.model.get_input_embeddings().weight
        self._name = next(name for name, parameter in module.trainable.items() if parameter is weight)
        self._initial = initial[self._name]
        self._text = texts_of(module.objective)[0]

    def scores(self, adapter: Adapter) -> Tensor:
        """A score of every item, ``[I]``."""
        moved_VD = adapter[self._name].float() - self._initial.float()
        inside = self._text.inside
        usual_D = moved_VD[self._text.tokens[inside].unique()].median(dim=0).values
        token_V = (moved_VD - usual_D).norm(dim=1)
        return (token_V[self._text.tokens] * inside).sum(dim=1) / self._text.lengths


class UpdateScores:
    """Guesses the items that the updated model ranks higher than the initial one, on histories of public users.

    The score of an item is the mean over these histories of log p_after(item) - log p_before(item), where p is the
    softmax over all items of the ranker's scores. It needs no rows, and so fits LoRA.

    Args:
        module: The recommender.
        model: Puts adapters into it.
        initial: The adapter before the update.
        data: Has the public users; without any, histories are of random items.
        seed: Of these.
    """

    def __init__(
        self, module: FellrecModule, model: ClientModel, initial: StoredTensors, data: PreparedData, seed: int
    ) -> None:
        self._module, self._model = module, model
        users = np.flatnonzero((data.client_of_user == PUBLIC) & (data.train.lengths > 0))[:_MOST_HISTORIES]
        shape = (_MOST_HISTORIES, data.max_history)
        drawn = np.random.default_rng(seed).integers(len(data.catalogue), size=shape)
        self._histories = torch.from_numpy(data.train.take(users).last(data.max_history) if len(users) else drawn)
        self._before = self._log_p(initial)

    def scores(self, adapter: StoredTensors) -> Tensor:
        """A score of every item, ``[I]``."""
        return (self._log_p(adapter) - self._before).mean(dim=0)

    @torch.no_grad()
    def _log_p(self, adapter: StoredTensors) -> Tensor:
        self._module.eval()
        with self._model.evaluating(ScoreJob(0, adapter, (0,)), "test", 0):
            self._module.ranker.refresh(self._module.model)
            device = self._module.model.model.get_input_embeddings().weight.device
            parts = [self._module.ranker.scores(self._module.model, h.to(device)) for h in self._histories.split(16)]
        scores_BI = torch.cat([part[0] if part.dim() == 3 else part for part in parts]).float().cpu()
        return F.log_softmax(scores_BI.nan_to_num(neginf=scores_BI[scores_BI.isfinite()].min().item()), dim=1)


def recall_of(scores_I: Tensor, items: NDArray[np.int64]) -> float:
    """Fraction of a client's n items among the n with the largest scores.

    Example:
        >>> recall_of(torch.tensor([0.1, 0.9, 0.5]), np.array([1, 0]))
        0.5
    """
    best = scores_I.topk(len(items)).indices.numpy()
    return float(np.isin(items, best).mean())


def update_recall(
    trainer: LocalTrainer, initial: StoredTensors, attacks: Mapping[str, Callable[[StoredTensors], Tensor]]
) -> dict[str, float]:
    """Mean over clients of the recall of training items from their first update, for some attacks.

    Args:
        trainer: Its data module has the clients of `with_clients`.
        initial: The adapter that they start from.
        attacks: Name → scores of all items ``[I]`` from a client's adapter.

    Returns:
        By attack, and ``"chance"``: n of I items drawn at random.
    """
    data = trainer.datamodule.data
    found: dict[str, list[float]] = {name: [] for name in (*attacks, "chance")}
    for client in range(data.num_clients):
        items = items_of(data, client)
        adapter = first_update(trainer, client, initial)
        for name, scores in attacks.items():
            found[name].append(recall_of(scores(adapter), items))
        found["chance"].append(len(items) / len(data.catalogue))
    return {name: float(np.mean(values)) for name, values in found.items()}
