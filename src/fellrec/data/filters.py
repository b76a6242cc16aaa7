"""Filters on interactions."""

from __future__ import annotations

import pandas as pd

from fellrec.errors import DataError


def k_core(interactions: pd.DataFrame, core: int) -> pd.DataFrame:
    """Drop users and items with fewer than ``core`` interactions, repeatedly until none is left (k-core filtering).

    Args:
        interactions: Columns ``user_id`` and ``item_id``.
        core: Minimum number of interactions; 0 keeps everything.

    Raises:
        DataError: If no interaction is left.

    Example:
        >>> frame = pd.DataFrame({"user_id": ["a", "a", "b"], "item_id": ["x", "y", "x"]})
        >>> len(k_core(frame, 1))
        3
    """
    kept = interactions
    while core > 0:
        users = kept.groupby("user_id")["item_id"].transform("size")
        items = kept.groupby("item_id")["user_id"].transform("size")
        enough = (users >= core) & (items >= core)
        if bool(enough.all()):
            break
        kept = kept[enough]
    if kept.empty:
        raise DataError(f"data.core={core} leaves no interactions of {len(interactions)}")
    return kept


def long_histories(interactions: pd.DataFrame, least: int) -> pd.DataFrame:
    """Drop users with fewer than ``least`` interactions.

    Raises:
        DataError: If no interaction is left.

    Example:
        >>> long_histories(pd.DataFrame({"user_id": ["a", "a", "b"]}), 2)["user_id"].tolist()
        ['a', 'a']
    """
    kept = interactions[interactions.groupby("user_id")["user_id"].transform("size") >= least]
    if kept.empty:
        raise DataError(f"data.min_user_interactions={least} leaves no interactions of {len(interactions)}")
    return kept
