"""Holdouts: assign each interaction to training, validation or test."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fellrec.data.ragged import IntArray, Ragged
from fellrec.data.settings import GivenSplitSettings, GlobalTimeSettings, LeaveOneOutSettings
from fellrec.errors import DataError

TRAIN, VALID, TEST = 0, 1, 2


class Holdout(Protocol):
    """Interface of ``holdout``."""

    def assign(self, histories: Ragged, times: NDArray[np.float64]) -> IntArray:
        """Return ``TRAIN``, ``VALID`` or ``TEST`` for each interaction, ``[total]``."""


class LeaveOneOut(LeaveOneOutSettings):
    """Leave-one-out: each user's last interaction is the test target, the one before it the validation target.

    All interactions of users with fewer than ``min_length`` interactions are for training.
    """

    def assign(self, histories: Ragged, times: NDArray[np.float64]) -> IntArray:
        """See `Holdout.assign`."""
        lengths = histories.lengths[histories.row_index]
        from_end = lengths - 1 - histories.positions
        stage = np.where(from_end == 0, TEST, np.where(from_end == 1, VALID, TRAIN))
        return np.where(lengths >= self.min_length, stage, TRAIN).astype(np.int64)


class GlobalTime(GlobalTimeSettings):
    """Global temporal holdout: the latest interactions of all users are for test, those before for validation.

    See METHOD §5.
    """

    def assign(self, histories: Ragged, times: NDArray[np.float64]) -> IntArray:
        """See `Holdout.assign`.

        Raises:
            DataError: If the timestamps are not times, see `check_times`.
        """
        check_times(histories.row_index, times)
        order = np.argsort(times, kind="stable")
        num_valid, num_test = int(len(times) * self.valid_rate), int(len(times) * self.test_rate)
        stage = np.full(len(times), TRAIN, dtype=np.int64)
        stage[order[len(times) - num_test :]] = TEST
        stage[order[len(times) - num_test - num_valid : len(times) - num_test]] = VALID
        return stage


class GivenSplit(GivenSplitSettings):
    """The split of the data set's own files, which `fellrec.data.prepare` takes from the reader."""

    def assign(self, histories: Ragged, times: NDArray[np.float64]) -> IntArray:
        """Not called for data that are split.

        Raises:
            DataError: Always.
        """
        raise DataError(
            "holdout=given needs data that are split: NAME.train.inter, NAME.valid.inter and NAME.test.inter "
            "with data=atomic"
        )


def check_times(users: IntArray, times: NDArray[np.float64]) -> None:
    """Check that timestamps can be compared between users, as a split over time requires.

    Refused are: equal timestamps; timestamps that count from each user's first interaction (all users begin with the
    same one); and whole numbers without ties of which users have most from the smallest one on, which are places in the
    user's own order after a filter.

    Args:
        users: ``[n]`` user of each interaction.
        times: ``[n]`` its timestamp.

    Raises:
        DataError: If they cannot.
    """
    order = np.lexsort((times, users))
    user, time = users[order], times[order]
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    lengths = np.diff(starts, append=len(user))
    first, last = time[starts], time[starts + lengths - 1]
    several = lengths > 1
    if not several.any():
        return
    if (first == last)[several].all():
        which = "all timestamps" if first.min() == first.max() else "all timestamps of each user"
        raise _not_times(f"{which} are equal, so a split over time would divide users")
    is_whole = bool((time % 1 == 0).all())
    has_ties = bool((np.diff(time)[np.diff(user) == 0] == 0).any())
    is_dense = is_whole and not has_ties and len(time) >= _DENSE * (last - first.min() + 1).sum()
    begin_together = bool((first == first[0]).all()) and (is_whole or len(starts) > 2)  # two may do so by chance
    if len(starts) > 1 and (is_dense or begin_together):
        raise _not_times(
            "this data set has only the position of each interaction in its user's history"
            if is_whole
            else "the timestamps of this data set count from each user's first interaction"
        )


_DENSE = 0.5
"""Fraction of the places in their users' order that are left after a filter, above which timestamps count as places."""


def _not_times(why: str) -> DataError:
    return DataError(f"holdout=global_time needs timestamps, but {why}; use holdout=leave_one_out")
