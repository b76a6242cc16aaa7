"""The prepared data set of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fellrec.data.ragged import IntArray, Ragged
from fellrec.data.schema import Catalogue


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
