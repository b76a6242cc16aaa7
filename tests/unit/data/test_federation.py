"""Joined data sets: each member's users, items and clients are in one place, and nothing crosses it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fellrec.data.datamodule import FellrecDataModule
from fellrec.data.federation import join
from fellrec.data.guards import check_batch, check_catalogues
from fellrec.data.holdout import LeaveOneOut
from fellrec.data.partition import RandomPartition
from fellrec.data.prepare import prepare
from fellrec.data.prepared import PreparedData
from fellrec.data.ragged import Ragged
from fellrec.data.readers import SyntheticReader
from fellrec.data.settings import DataSettings
from fellrec.errors import ConfigError, DataError, LeakError

SETTINGS = DataSettings("films", root=None)


def made(num_users: int = 40, clients: int = 2, **changes: object) -> PreparedData:
    reader = SyntheticReader(num_users=num_users, num_items=40, mean_length=10, seed=num_users)
    settings = dataclasses.replace(SETTINGS, **changes)  # type: ignore[arg-type]
    return prepare(reader, settings, LeaveOneOut(), RandomPartition(clients), None)


@pytest.fixture(scope="module")
def members() -> dict[str, PreparedData]:
    """Two data sets with the same item ids and titles, and the same user ids."""
    return {"first": made(40, 2), "second": made(50, 3)}


@pytest.fixture(scope="module")
def data(members: dict[str, PreparedData]) -> PreparedData:
    return join("both", members)


def test_members_follow_each_other(members: dict[str, PreparedData], data: PreparedData) -> None:
    """Written down user by user: ids, items and clients of each member, with its name before the ids."""
    ids: list[str] = []
    for name, own in members.items():
        for user in range(len(own.users)):
            ids.append(f"{name}/{own.users['user_id'][user]}")
            place = len(ids) - 1
            for part in ("histories", "train", "valid", "test"):
                expected = [f"{name}/{own.catalogue.item_ids[item]}" for item in getattr(own, part).row(user)]
                assert [data.catalogue.item_ids[item] for item in getattr(data, part).row(place)] == expected
            client = own.client_of_user[user]
            assert data.client_of_user[place] == (client if client < 0 else client + 2 * (name == "second"))
    assert data.users["user_id"].tolist() == ids
    assert len(set(data.catalogue.item_ids)) == sum(len(own.catalogue) for own in members.values())
    assert data.catalogue.titles == members["first"].catalogue.titles + members["second"].catalogue.titles
    assert (data.num_clients, data.statistics["clients"]) == (5, 5)
    assert data.statistics["users_per_client"] == [
        number for own in members.values() for number in own.statistics["users_per_client"]
    ]
    assert data.train_targets.tolist() == [flag for own in members.values() for flag in own.train_targets.tolist()]
    assert (
        len({data.key, join("both", dict(reversed(members.items()))).key, *(own.key for own in members.values())}) == 4
    )


def test_places_translate_between_joined_and_own_numbers(members: dict[str, PreparedData], data: PreparedData) -> None:
    places, first = data.places, len(members["first"].catalogue)
    items = torch.tensor([0, first - 1, first, len(data.catalogue) - 1])
    assert places.of_items(items).tolist() == [0, 0, 1, 1]
    assert places.local(torch.tensor([first, -1, first + 3]), 1).tolist() == [0, -1, 3]
    assert [places.of_client(client) for client in range(5)] == [0, 0, 1, 1, 1]
    assert members["first"].places.of_items(items[:2]).tolist() == [0, 0], "one data set is its own member"


def test_batches_are_of_one_member(data: PreparedData) -> None:
    """All rows and users are in one batch each; those of one client are those of its member."""
    module = FellrecDataModule(data, lambda items, is_target: {"items": items}, batch_size=7, eval_batch_size=7)
    for loader in (module.train_loader(None, 0), module.train_loader(-1, 0), module.loss_loader(None)):
        members = [set(data.places.of_items(batch["items"][:, 0]).tolist()) for batch in loader]
        assert {len(found) for found in members} == {1}
        assert set.union(*members) == {0, 1}
    rows = torch.cat([batch["items"] for batch in module.train_loader(None, 0)])
    assert sorted(rows.tolist()) == sorted(
        row for client in range(5) for batch in module.train_loader(client, 0) for row in batch["items"].tolist()
    )
    assert module.num_batches(None) == len(module.train_loader(None, 0)) == len(module.loss_loader(None))
    users = [batch["users"] for batch in module.eval_loader("test")]
    assert all(len(set((batch >= data.places.users[1]).tolist())) == 1 for batch in users)
    assert sorted(torch.cat(users).tolist()) == sorted(module._users["test"].users.tolist())


def test_an_item_of_another_catalogue_is_found_in_the_data(data: PreparedData) -> None:
    """Planted: an item that only users of the first member may have, and a user at a client of the other member."""
    user = len(data.users) - 1
    place = data.train.offsets[user]
    for part in ("train", "histories"):
        ragged = getattr(data, part)
        values = ragged.values.copy()
        values[ragged.offsets[user] if part == "histories" else place] = 0
        wrong = dataclasses.replace(data, **{part: Ragged(values, ragged.offsets)})  # type: ignore[arg-type]
        with pytest.raises(LeakError, match=r"another catalogue.*item 'first/.*' of user 'second/"):
            check_catalogues(wrong)
    client_of_user = data.client_of_user.copy()
    client_of_user[np.flatnonzero(client_of_user == 4)[0]] = 0
    with pytest.raises(LeakError, match="clients with another catalogue"):
        check_catalogues(dataclasses.replace(data, client_of_user=client_of_user))
    with pytest.raises(LeakError):
        FellrecDataModule(wrong, lambda items, is_target: {}, batch_size=7, eval_batch_size=7)
    check_catalogues(data)


def test_an_item_of_another_catalogue_is_found_in_a_batch(data: PreparedData) -> None:
    module = FellrecDataModule(data, lambda items, is_target: {}, batch_size=7, eval_batch_size=7)
    places = data.places
    batch = places.local_batch(next(iter(module.eval_loader("test", (3,)))), 1)
    num_items = places.items[2] - places.items[1]
    check_batch(batch, num_items)
    for name in ("target_items", "masked_items", "histories"):
        for stranger in (num_items, -2):
            values = batch[name].clone()
            values.view(-1)[0] = stranger
            with pytest.raises(LeakError, match=f"{name} that are not in the catalogue of {num_items} items"):
                check_batch({**batch, name: values}, num_items)


def test_members_that_do_not_fit_together_are_refused(members: dict[str, PreparedData]) -> None:
    own = members["first"]
    empty = dataclasses.replace(own, users=own.users[:0])
    with pytest.raises(DataError, match=r"data.member.none has no users"):
        join("x", {"first": own, "none": empty})
    with pytest.raises(DataError, match="at least one data set"):
        join("x", {})
    with pytest.raises(ConfigError, match=r"data.member.a.max_history=10, data.member.b.max_history=5: .* same max_hi"):
        join("x", {"a": own, "b": dataclasses.replace(own, max_history=5)})
    with pytest.raises(ConfigError, match=r"data.member.b.repeats=keep: members .* must have the same repeats"):
        join("x", {"a": own, "b": dataclasses.replace(own, ranks_seen=True)})
