"""The prepared data set of a run."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from fellrec.data.ragged import IntArray, Ragged
from fellrec.data.schema import Catalogue


@dataclass(frozen=True)
class Places:
    """Where the members of a federation are in its joined data.

    Item ``i`` is of member ``m`` if ``items[m] <= i < items[m + 1]``; so are users and clients.

    Attributes:
        names: Of the M members.
        items: M + 1 bounds of the items; the items of a member are the catalogue of its clients.
        users: M + 1 bounds of the users.
        clients: M + 1 bounds of the clients.
    """

    names: tuple[str, ...]
    items: tuple[int, ...]
    users: tuple[int, ...]
    clients: tuple[int, ...]

    @classmethod
    def of(cls, members: Mapping[str, PreparedData]) -> Places:
        """The places of members that are joined in this order."""
        own = list(members.values())
        return cls(
            names=tuple(members),
            items=tuple(accumulate((len(data.catalogue) for data in own), initial=0)),
            users=tuple(accumulate((len(data.users) for data in own), initial=0)),
            clients=tuple(accumulate((data.num_clients for data in own), initial=0)),
        )

    def __len__(self) -> int:
        return len(self.names)

    def of_items(self, items: Tensor) -> Tensor:
        """The member of each item, of any shape; padding (-1) counts as an item of the first.

        Example:
            >>> Places(("a", "b"), (0, 3, 5), (0, 1, 2), (0, 1, 2)).of_items(torch.tensor([2, 3, 4]))
            tensor([0, 1, 1])
        """
        bounds = torch.tensor(self.items[1:-1], dtype=torch.long, device=items.device)
        return torch.bucketize(items.contiguous(), bounds, right=True)

    def of_client(self, client: int) -> int:
        """The member of a client."""
        return bisect_right(self.clients, client) - 1

    def of_batch(self, histories: Tensor) -> int:
        """The member of the users of a batch, by the first item of the first history ``[B, H]``."""
        return int(self.of_items(histories[0, 0])) if len(self) > 1 else 0

    def local(self, items: Tensor, member: int) -> Tensor:
        """Numbers of items in the member's own catalogue, from those in the joined one; -1 stays -1."""
        return torch.where(items >= 0, items - self.items[member], items) if member else items

    def local_batch(self, batch: Mapping[str, Tensor], member: int) -> dict[str, Tensor]:
        """An evaluation batch of a member's users with the numbers of its items, users and clients."""
        if not member:
            return dict(batch)
        own = {name: self.local(batch[name], member) for name in _ITEMS if name in batch}
        first = {"users": self.users[member], "clients": self.clients[member]}
        return {**batch, **own, **{name: batch[name] - number for name, number in first.items()}}


_ITEMS = ("histories", "target_items", "seen_items", "masked_items")
"""Entries of an evaluation batch that are numbers of items."""


@dataclass(frozen=True)
class PreparedData:
    """The prepared data set of a run; user ``u`` is row ``u`` in all fields. Built by ``fellrec.data.prepare``.

    Attributes:
        name: Name of the data set.
        catalogue: The items.
        users: ``user_id`` and attributes.
        histories: All interactions, oldest first, before the holdout; the reference of the leak checks.
        train: Training interactions, oldest first.
        valid: Validation targets; empty for public users.
        test: Test targets; empty for public users.
        train_targets: ``[len(train.values)]`` bool, training interactions that are targets; never a user's first one.
        client_of_user: ``[U]`` int64 client of each user; `PUBLIC` for public users.
        num_clients: C.
        max_history: Longest history in items that a model receives.
        ranks_seen: Whether users may repeat items, so that the items of their histories are ranked too.
        key: Hash of all settings and inputs of the preparation.
        statistics: Counts for reports.
        notes: What a user may not expect of the data, one sentence each.
        members: Of a federation, the prepared data sets that these are joined from, by name; empty for one data set.
    """

    name: str
    catalogue: Catalogue
    users: pd.DataFrame
    histories: Ragged
    train: Ragged
    valid: Ragged
    test: Ragged
    train_targets: NDArray[np.bool_]
    client_of_user: IntArray
    num_clients: int
    max_history: int
    key: str
    ranks_seen: bool = False
    statistics: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    members: Mapping[str, PreparedData] = field(default_factory=dict)

    @cached_property
    def places(self) -> Places:
        """Where the members are in the joined data; one data set is the only member of itself."""
        return Places.of(self.members or {self.name: self})
