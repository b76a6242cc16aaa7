"""Several prepared data sets as one: each member's users, items and clients follow those of the members before it.

Ids of users and items are ``MEMBER/ID``, so that members may have the same ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pandas as pd

from fellrec.data.guards import check_catalogues, check_holdout
from fellrec.data.prepared import Places, PreparedData
from fellrec.data.ragged import IntArray, Ragged, offsets_of
from fellrec.data.schema import Catalogue
from fellrec.data.statistics import statistics
from fellrec.errors import ConfigError, DataError
from fellrec.types import PUBLIC


def join(name: str, members: Mapping[str, PreparedData]) -> PreparedData:
    """Join prepared data sets.

    Args:
        name: Of the federation.
        members: By name, in the order of their clients.

    Raises:
        DataError: If no member is given, or one has no users.
        ConfigError: If members differ in ``data.max_history``, or in whether seen items are ranked.
    """
    _check_members(members)
    own = list(members.values())
    places = Places.of(members)
    owners = [
        np.where(data.client_of_user >= 0, data.client_of_user + first, PUBLIC)
        for data, first in zip(own, places.clients, strict=False)
    ]
    joined = PreparedData(
        name=name,
        catalogue=_catalogue(members),
        users=pd.concat(
            [data.users.assign(user_id=_named(member, data.users["user_id"])) for member, data in members.items()],
            ignore_index=True,
        ),
        histories=_stacked([data.histories for data in own], places),
        train=_stacked([data.train for data in own], places),
        valid=_stacked([data.valid for data in own], places),
        test=_stacked([data.test for data in own], places),
        train_targets=np.concatenate([data.train_targets for data in own]),
        client_of_user=np.concatenate(owners),
        num_clients=places.clients[-1],
        max_history=own[0].max_history,
        key=_key(members),
        ranks_seen=own[0].ranks_seen,
        notes=tuple(f"{member}: {note}" for member, data in members.items() for note in data.notes),
        members=dict(members),
    )
    check_holdout(joined)
    check_catalogues(joined)
    of_members = {member: dict(data.statistics) for member, data in members.items()}
    return replace(joined, statistics={**statistics(joined), "members": of_members})


def _check_members(members: Mapping[str, PreparedData]) -> None:
    if not members:
        raise DataError("a federation needs at least one data set: give data.members")
    for name, data in members.items():
        if not len(data.users):
            raise DataError(f"data.member.{name} has no users")
    for setting, values in (
        ("max_history", {name: data.max_history for name, data in members.items()}),
        ("repeats", {name: "keep" if data.ranks_seen else "last or first" for name, data in members.items()}),
    ):
        if len(set(values.values())) > 1:
            given = ", ".join(f"data.member.{name}.{setting}={value}" for name, value in values.items())
            raise ConfigError(f"{given}: members of a federation must have the same {setting}")


def _key(members: Mapping[str, PreparedData]) -> str:
    keys = [(name, data.key) for name, data in members.items()]
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:16]


def _named(member: str, ids: pd.Series) -> pd.Series:
    return f"{member}/" + ids.astype(str)


def _catalogue(members: Mapping[str, PreparedData]) -> Catalogue:
    return Catalogue(
        item_ids=tuple(f"{member}/{item}" for member, data in members.items() for item in data.catalogue.item_ids),
        titles=tuple(title for data in members.values() for title in data.catalogue.titles),
        attributes=pd.concat([data.catalogue.attributes for data in members.values()], ignore_index=True),
    )


def _stacked(rows: list[Ragged], places: Places) -> Ragged:
    """The rows of all members; items get the numbers that they have in the joined catalogue."""
    values: IntArray = np.concatenate([part.values + first for part, first in zip(rows, places.items, strict=False)])
    return Ragged(values, offsets_of(np.concatenate([part.lengths for part in rows])))
