"""Holdouts: assign each interaction to training, validation or test."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fellrec.data.ragged import IntArray, Ragged
from fellrec.data.settings import GlobalTimeSettings, LeaveOneOutSettings
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
            DataError: If the timestamps are positions within each user's history instead of times.
        """
        if np.array_equal(times, histories.positions.astype(np.float64)):
            raise DataError(
                "holdout=global_time needs timestamps, but this data set has only the position of each interaction in "
                "its user's history; use holdout=leave_one_out"
            )
        order = np.argsort(times, kind="stable")
        num_valid, num_test = int(len(times) * self.valid_rate), int(len(times) * self.test_rate)
        stage = np.full(len(times), TRAIN, dtype=np.int64)
        stage[order[len(times) - num_test :]] = TEST
        stage[order[len(times) - num_test - num_valid : len(times) - num_test]] = VALID
        return stage
