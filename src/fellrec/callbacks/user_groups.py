"""How evenly groups of users are served, within and over clients: by activity, and by attributes of users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch

from fellrec.data.prepared import PreparedData
from fellrec.errors import ConfigError, unknown
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.records import FitResult
from fellrec.functional.balance import balance
from fellrec.functional.ranges import Allowed, Count
from fellrec.tracking.run_log import RunLog
from fellrec.types import Evaluation

ACTIVITY = "activity"
FILE = "user_groups.csv"
Columns = Annotated[
    Sequence[str],
    Allowed(
        lambda value: isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value),
        "a list of activity and user attributes, such as [activity,gender]",
    ),
]
_QUARTILES = ("q1", "q2", "q3", "q4")


class UserGroups(FederatedCallback):
    """Reports the tested metrics of groups of users at each client.

    A group is a quartile of the clients' users by number of training interactions (``activity``; q1 has the fewest), or
    the users with one value of an attribute. A cell is a group at a client. ``user_groups.csv`` has every cell; of the
    cells with enough users the statistics of balance are logged as ``test/groups/activity/ndcg_at_10/std`` and so on.

    Args:
        log: Of the run; the table is written to its directory.
        data: The prepared data.
        config: Of the run; its ``trainer.metric`` is logged.
        columns: ``activity``, or columns of the user file.
        least_users: Cells with fewer users are in the table only.

    Raises:
        ConfigError: If there is no such attribute.
    """

    def __init__(
        self, log: RunLog, data: PreparedData, config: Any, columns: Columns = (ACTIVITY,), least_users: Count = 5
    ) -> None:
        known = [ACTIVITY, *(name for name in data.users.columns if name != "user_id")]
        for name in columns:
            if name not in known:
                raise ConfigError(unknown("user attribute in callbacks.user_groups.columns", name, known))
        self.log = log
        self.metric = str(config.trainer.metric)
        self.least_users = least_users
        self.labels = {name: group_labels(data, name) for name in columns}

    def on_fit_end(self, result: FitResult) -> None:
        """Write the table and log the statistics."""
        tables = [cells(result.evaluation, name, labels) for name, labels in self.labels.items()]
        if not tables:
            return
        path = self.log.run_dir / FILE
        pd.concat(tables).to_csv(path, index=False)
        self.log.log_artifact(path)
        metrics: dict[str, float] = {}
        for name, table in zip(self.labels, tables, strict=True):
            values = torch.tensor(table.loc[table["users"] >= self.least_users, self.metric].to_numpy(copy=True))
            figures = {"num_cells": float(len(values)), **({"mean": float(values.mean())} if len(values) else {})}
            figures |= balance(values) if len(values) else {}
            metrics |= {f"test/groups/{name}/{self.metric}/{figure}": value for figure, value in figures.items()}
        self.log.log_metrics(metrics, step=0, once="user groups")


def group_labels(data: PreparedData, column: str) -> np.ndarray[Any, np.dtype[np.object_]]:
    """The group of each user, ``[U]`` text; empty for users without a value and for public users.

    Users with equally many interactions are in one quartile: the lower one of those that they span.
    """
    is_private = data.client_of_user >= 0
    if column != ACTIVITY:
        values = data.users[column].fillna("").astype(str).to_numpy(dtype=object)
        return np.where(is_private, values, "")
    counts = data.train.lengths
    bounds = np.quantile(counts[is_private], [0.25, 0.5, 0.75]) if is_private.any() else np.zeros(3)
    return np.where(is_private, np.array(_QUARTILES, dtype=object)[np.searchsorted(bounds, counts)], "")


def cells(evaluation: Evaluation, name: str, labels: np.ndarray[Any, np.dtype[np.object_]]) -> pd.DataFrame:
    """One row for each group at each client: its evaluated users and the mean of each metric.

    Args:
        evaluation: Of all clients.
        name: Of the kind of group.
        labels: ``[U]``, the group of every user of the data; empty for none.
    """
    assert evaluation.users is not None
    table = pd.DataFrame({metric: values.numpy() for metric, values in evaluation.per_user.items()})
    table.insert(0, "client", evaluation.client_of_user.numpy())
    table.insert(0, "group", labels[evaluation.users.numpy()])
    table = table[table["group"] != ""]
    found = table.groupby(["group", "client"], sort=True)
    means = found.mean(numeric_only=True)
    means.insert(0, "users", found.size())
    return means.reset_index().assign(by=name)[["by", "group", "client", *means.columns]]
