"""What an update says of a client's users, on updates that are made by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from fellrec.attacks.public import Public, public_item_counts
from fellrec.attacks.update import UpdateRows, items_of, recall_of, with_clients
from fellrec.data.prepared import PreparedData
from fellrec.data.ragged import Ragged
from tests.unit.attacks.conftest import CATALOGUE

ROWS = [[0, 1, 2], [3, 4], [5], [6, 7, 6], [8, 9], [1, 1, 1]]


@pytest.fixture
def data() -> PreparedData:
    """Five private users of two clients, of whom one has one interaction, and a public one."""
    train = Ragged.from_rows(ROWS)
    nothing = Ragged.from_rows([[]] * len(ROWS))
    return PreparedData(
        name="", catalogue=CATALOGUE, users=pd.DataFrame({"user_id": range(len(ROWS))}), histories=train, train=train,
        valid=nothing, test=nothing, train_targets=np.ones(len(train.values), dtype=bool),
        client_of_user=np.array([0, 0, 1, 1, 0, -1]), num_clients=2, max_history=5, key="",
    )  # fmt: skip


@pytest.mark.parametrize(("users_per_client", "most", "number"), [(1, 10, 4), (1, 3, 3), (2, 10, 2), (5, 10, 0)])
def test_clients_are_disjoint_groups_of_private_users_with_something_to_predict(
    data: PreparedData, users_per_client: int, most: int, number: int
) -> None:
    found = with_clients(data, users_per_client, most, seed=0)
    assert found.num_clients == number
    assert np.bincount(found.client_of_user + 1, minlength=number + 1)[1:].tolist() == [users_per_client] * number
    assert found.client_of_user[[2, 5]].tolist() == [-1, -1]
    for client in range(number):
        users = np.flatnonzero(found.client_of_user == client)
        assert set(items_of(found, client).tolist()) == {item for user in users for item in ROWS[user]}


def test_popularity_is_that_of_public_users(data: PreparedData) -> None:
    assert public_item_counts(data)[:3].tolist() == [1, 4, 1]


def test_items_whose_rows_moved_unlike_the_others_come_first(public: Public) -> None:
    """All rows move by -1; only those of the tokens of items 4 and 16, amber and blue tent, move by +1."""
    weight = public.model.model.get_input_embeddings().weight
    text = public.objective.history_text  # type: ignore[attr-defined]
    module = SimpleNamespace(model=public.model, objective=public.objective, trainable={"embedding": weight})
    moved = -torch.ones_like(weight)
    for item in (4, 16):
        moved[text.tokens[item][text.inside[item]]] = 1.0
    before = weight.detach().clone()
    scores = UpdateRows(module, {"embedding": before}).scores({"embedding": before + moved})  # type: ignore[arg-type]
    assert set(scores.topk(2).indices.tolist()) == {4, 16}
    assert recall_of(scores, np.array([4, 16])) == 1.0
    assert recall_of(scores, np.array([4, 5])) == 0.5
