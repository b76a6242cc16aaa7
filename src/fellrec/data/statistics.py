"""Counts of prepared data for reports, and sentences about what a user may not expect of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fellrec.data.prepared import PreparedData
from fellrec.data.ragged import IntArray, Ragged
from fellrec.data.settings import DataSettings

STAGES = ("train", "valid", "test")


def statistics(data: PreparedData) -> dict[str, Any]:
    """Counts of users, items and interactions; those of stages are of the clients' users."""
    owner, catalogue = data.client_of_user, data.catalogue
    private = owner >= 0
    seen = np.zeros(len(catalogue), dtype=bool)
    seen[data.train.values] = True
    num_targets = np.bincount(data.train.row_index, weights=data.train_targets, minlength=len(owner))
    interactions = {name: getattr(data, name).lengths for name in STAGES}
    num_interactions = int(sum(lengths.sum() for lengths in interactions.values()))
    return {
        **{name: int(lengths[private].sum()) for name, lengths in interactions.items()},
        "public_train": int(data.train.lengths[~private].sum()),
        "users": len(owner),
        "public_users": int((~private).sum()),
        "items": len(catalogue),
        "density": num_interactions / (len(owner) * len(catalogue)),
        "distinct_titles": int(catalogue.title_groups.max()) + 1,
        "words_per_title": float(np.mean([len(title.split()) for title in catalogue.titles])),
        "clients": data.num_clients,
        "users_per_client": np.bincount(owner[private], minlength=data.num_clients).tolist(),
        "train_targets_per_client": np.bincount(
            owner[private], weights=num_targets[private], minlength=data.num_clients
        )
        .astype(int)
        .tolist(),
        "evaluated_users": int(((data.test.lengths > 0) & private).sum()),
        "users_too_short_to_test": int(((data.test.lengths == 0) & private).sum()),
        "users_without_training": int((private & (data.train.lengths == 0)).sum()),
        "test_targets_never_trained_on": int((~seen[data.test.values]).sum()),
    }


def tie_counts(histories: Ragged, times: NDArray[np.float64], stages: IntArray) -> dict[str, int]:
    """Ties in time.

    Args:
        histories: All interactions.
        times: ``[total]`` their timestamps.
        stages: ``[total]`` their stages.

    Returns:
        ``neighbours``, pairs of successive interactions of a user, and how many of them are ``tied_neighbours``, with
        equal times; ``tied_holdouts``, those of different stages among them, whose stages the tie decides; and
        ``held_out_before_training``, pairs whose later stage has the earlier time, as in a split that is given.
    """
    same_user = np.diff(histories.row_index) == 0
    tied = same_user & (np.diff(times) == 0)
    return {
        "neighbours": int(same_user.sum()),
        "tied_neighbours": int(tied.sum()),
        "tied_holdouts": int((tied & (np.diff(stages) != 0)).sum()),
        "held_out_before_training": int((same_user & (np.diff(stages) > 0) & (np.diff(times) < 0)).sum()),
    }


def cut_ties(times: NDArray[np.float64], stages: IntArray) -> int:
    """Number of interactions with a time at which a split over time divides two stages.

    Args:
        times: ``[total]`` timestamps.
        stages: ``[total]`` stages, not descending with time.

    Example:
        >>> cut_ties(np.array([1.0, 2.0, 2.0, 2.0, 3.0]), np.array([0, 0, 0, 1, 2]))
        3
    """
    found = 0
    for stage in range(1, len(STAGES)):
        earlier, later = times[stages < stage], times[stages >= stage]
        if len(earlier) and len(later) and earlier.max() == later.min():
            found += int((times == later.min()).sum())
    return found


def notes(counts: dict[str, Any], settings: DataSettings, num_clients: int | None) -> Iterator[str]:
    """What the user should know of the preparation, one sentence each.

    Args:
        counts: From `statistics` and `tie_counts`; ``tied_at_cuts`` from `cut_ties`, for a split over time.
        settings: Of the preparation.
        num_clients: The number of clients that was asked for, if any.
    """
    tied, neighbours = counts["tied_neighbours"], counts["neighbours"]
    if tied and settings.ties == "file":
        yield (
            f"{tied:,} of {neighbours:,} successive interactions of a user ({tied / neighbours:.1%}) have equal times, "
            f"{counts['tied_holdouts']:,} of them in different stages: the order of the file decides; "
            "data.ties=shuffle does not depend on it"
        )
    if early := counts["held_out_before_training"]:
        yield (
            f"{early:,} times a user's first interaction of a held-out part is older than the last one before it: the "
            "split is not by time, and models see later interactions than they are tested on"
        )
    if at_cuts := counts.get("tied_at_cuts"):
        yield f"{at_cuts:,} interactions have the time at which two stages are divided: the order of the files decides"
    asked = {
        "partition.num_clients": (num_clients, counts["clients"], "clients have users"),
        "data.max_users": (settings.max_users, counts["users"], "users exist"),
        "data.max_train_samples": (
            settings.max_train_samples,
            sum(counts["train_targets_per_client"]),
            "training targets exist",
        ),
    }
    for name, (wanted, found, what) in asked.items():
        if wanted is not None and wanted != found:
            yield f"{name}={wanted} was asked for, but {found} {what}"
