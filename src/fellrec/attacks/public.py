"""What an attacker knows: the backbone before the run, the catalogue, and the public users."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from lightning import Fabric
from torch import Tensor

from fellrec.attacks.titles import texts_of
from fellrec.data.datamodule import FellrecDataModule
from fellrec.data.prepared import PreparedData
from fellrec.federated.client_model import ClientModel
from fellrec.federated.records import ScoreJob
from fellrec.models.module import FellrecModule, Objective
from fellrec.models.split import SplitModel
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import PUBLIC

_MOST_ROWS = 512
"""Rows of public text."""


@dataclass(frozen=True)
class Public:
    """Public knowledge at one depth of the first cut; see `knowing` for how the model comes to be public.

    Attributes:
        model: With the parameters that all clients started from, cut at this depth; in evaluation mode.
        objective: Texts and losses, which are public.
        item_counts: ``[I]`` float64 interactions of public users with each item, plus 1.
        token_counts: ``[V]`` float64 how often each token is expected in a history of public users.
        texts: ``[B, L]`` token ids of batches of public text.
        seed: Of everything that an attack draws.
    """

    model: SplitModel
    objective: Objective
    item_counts: Tensor
    token_counts: Tensor
    texts: list[Tensor]
    seed: int

    @property
    def num_layers(self) -> int:
        """Layers of the head."""
        return self.model.cut.head_layers

    def generator(self) -> torch.Generator:
        """Random numbers of an attack, always the same."""
        return torch.Generator().manual_seed(self.seed)


def public_item_counts(data: PreparedData) -> Tensor:
    """How often public users interacted with each item, plus 1; ``[I]`` float64."""
    users = np.flatnonzero(data.client_of_user == PUBLIC)
    items = data.train.take(users).values
    return torch.from_numpy(np.bincount(items, minlength=len(data.catalogue))).double() + 1


def token_counts(objective: Objective, item_counts: Tensor, num_tokens: int) -> Tensor:
    """How often each token is expected in the titles of histories; ``[V]`` float64.

    Args:
        objective: Names the items.
        item_counts: ``[I]`` float64.
        num_tokens: V.
    """
    counts = torch.zeros(num_tokens, dtype=torch.float64)
    for text in texts_of(objective)[:1]:
        weights = item_counts[:, None].expand(text.inside.shape)
        counts.index_add_(0, text.tokens[text.inside], weights[text.inside])
    return counts


def public_texts(datamodule: FellrecDataModule, seed: int) -> list[Tensor]:
    """Token ids ``[B, L]`` of batches of public text: histories of public users, of random items without such users.

    Args:
        datamodule: Has the public users.
        seed: Of what is drawn.
    """
    if datamodule.num_samples(PUBLIC):
        batches = datamodule.train_loader(PUBLIC, seed)
        together = max(1, _MOST_ROWS // datamodule.batch_size)
        return [batch["input_ids"] for batch in islice(batches, together)]
    width = datamodule.data.max_history + 1
    generator = torch.Generator().manual_seed(seed)
    items = torch.randint(len(datamodule.data.catalogue), (_MOST_ROWS, width), generator=generator)
    is_target = torch.zeros_like(items, dtype=torch.bool)
    is_target[:, -1] = True
    parts = zip(items.split(datamodule.batch_size), is_target.split(datamodule.batch_size), strict=True)
    return [datamodule.collate(some, targets)["input_ids"] for some, targets in parts]


@contextmanager
def knowing(
    module: FellrecModule,
    model: ClientModel,
    initial: StoredTensors,
    datamodule: FellrecDataModule,
    seed: int,
    fabric: Fabric,
) -> Iterator[Public]:
    """While this lasts, the recommender has the parameters that all clients started from, which are public.

    Args:
        module: The recommender.
        model: Puts them into it, with a head of some depth.
        initial: The adapter that all clients started from.
        datamodule: Has the public users.
        seed: See `Public`.
        fabric: Device and precision.
    """
    module.eval()
    counts, objective = public_item_counts(datamodule.data), module.objective
    texts = [fabric.to_device(ids) for ids in public_texts(datamodule, seed)]
    with model.evaluating(ScoreJob(0, initial, (0,)), "test", -1), fabric.autocast():
        frequent = token_counts(objective, counts, module.model.num_embeddings)
        yield Public(module.model, objective, counts, frequent, texts, seed)
