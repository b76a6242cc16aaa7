"""The estimate of a run's time."""

from __future__ import annotations

import time

from fellrec.experiment.introduction import typical_seconds


def test_the_estimate_ignores_the_first_step_and_one_that_had_to_wait() -> None:
    """Six steps of 0.2 s or 0.01 s: the median of the last five is one of 0.01 s, whatever a busy machine adds to one."""
    naps = iter([0.2, 0.01, 0.2, 0.01, 0.01, 0.01])
    assert 0.01 <= typical_seconds(lambda: time.sleep(next(naps))) < 0.1
    assert next(naps, None) is None


def test_long_steps_are_not_repeated() -> None:
    """The second step reaches the limit, and is the one that counts; a first one of ten times the limit is enough."""
    naps = iter([0.5, 0.1, 0.0])
    assert 0.1 <= typical_seconds(lambda: time.sleep(next(naps)), long_seconds=0.1) < 0.5
    assert list(naps) == [0.0]
    naps = iter([0.5, 0.0])
    assert typical_seconds(lambda: time.sleep(next(naps)), long_seconds=0.05) >= 0.5
    assert list(naps) == [0.0]
