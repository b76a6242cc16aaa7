"""Holdouts: assign each interaction to training, validation or test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fellrec.data.ragged import IntArray, Ragged
from fellrec.errors import ConfigError, DataError

TRAIN, VALID, TEST = 0, 1, 2


class Holdout(Protocol):
    """Interface of ``holdout``."""

    def assign(self, histories: Ragged, times: NDArray[np.float64]) -> IntArray:
        """Return ``TRAIN``, ``VALID`` or ``TEST`` for each interaction, ``[total]``."""


@dataclass(frozen=True)
class LeaveOneOut:
    """Leave-one-out: each user's last interaction is the test target, the one before it the validation target.

    All interactions of users with fewer than ``min_length`` interactions are for training.

    Attributes:
        min_length: Shortest history with a validation and a test target, at least 3.
    """

    min_length: int = 3

    def assign(self, histories: Ragged, times: NDArray[np.float64]) -> IntArray:
        """See `Holdout.assign`.

        Raises:
            ConfigError: If ``min_length`` is below 3, which would leave no training interaction.
        """
        if self.min_length < 3:
            raise ConfigError(
                f"holdout.min_length={self.min_length} must be at least 3: one training, one validation and one test "
                "interaction"
            )
        lengths = histories.lengths[histories.row_index]
        from_end = lengths - 1 - histories.positions
        stage = np.where(from_end == 0, TEST, np.where(from_end == 1, VALID, TRAIN))
        return np.where(lengths >= self.min_length, stage, TRAIN).astype(np.int64)


@dataclass(frozen=True)
class GlobalTime:
    """Global temporal holdout: the latest interactions of all users are for test, those before for validation.

    See METHOD §5.

    Attributes:
        valid_rate: Fraction of the interactions for validation.
        test_rate: Fraction of the interactions for test.
    """

    valid_rate: float = 0.1
    test_rate: float = 0.1

    def assign(self, histories: Ragged, times: NDArray[np.float64]) -> IntArray:
        """See `Holdout.assign`.

        Raises:
            ConfigError: If the rates leave no training interaction.
            DataError: If the timestamps are positions within each user's history instead of times.
        """
        if min(self.valid_rate, self.test_rate) <= 0 or self.valid_rate + self.test_rate >= 1:
            raise ConfigError(
                f"holdout.valid_rate={self.valid_rate} and holdout.test_rate={self.test_rate} "
                "must be above 0 and their sum below 1"
            )
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
