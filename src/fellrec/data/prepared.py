"""The data of a run, as ``fellrec.data.prepare`` makes them and everything else reads them."""

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
    """The data of a run; user ``u`` is row ``u`` everywhere.

    Attributes:
        name: Of the data set.
        catalogue: The items.
        users: ``user_id`` and attributes.
        histories: All interactions before the holdout, oldest first; what guards compare the others with.
        train: Training interactions, oldest first.
        valid: Validation targets; empty for public users.
        test: Test targets; empty for public users.
        train_targets: ``[len(train.values)]`` bool: which training interactions are predicted; a user's first never.
        client_of_user: ``[U]`` int64; -1 is a public user.
        num_clients: C.
        max_history: Longest history a model sees.
        key: Hash of everything that shaped this.
        statistics: Counts, for people.
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
    statistics: Mapping[str, Any] = field(default_factory=dict)
