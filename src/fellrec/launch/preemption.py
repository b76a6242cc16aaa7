"""Lets a run that is told to stop end where little is lost, so that it can go on later."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from fellrec.errors import Preempted

REQUEUE_CODE = 75
"""Exit status of a run that SIGUSR1 stopped: it is to be started again (``EX_TEMPFAIL`` of sysexits.h)."""
GRACE_VARIABLE = "FELLREC_GRACE_SECONDS"
"""Environment variable: seconds from SIGUSR1 to the end; without it the run waits for its safe point."""
_TERM_SECONDS = 5.0
"""From SIGTERM to the end: SLURM kills after 30 seconds (``KillWait``), others after 10."""


class StopSignals:
    """While it is entered, SIGUSR1 and SIGTERM ask the run to stop instead of killing it.

    The first of them is remembered, and `Preemption` ends the run at the next safe point. If none comes in time, the
    run ends wherever it is, as after Ctrl-C, and the newest checkpoint counts. SIGUSR1 is SLURM's warning before a time
    limit or pre-emption and allows ``FELLREC_GRACE_SECONDS``; SIGTERM comes shortly before SIGKILL.

    Ctrl-C ends the run wherever it is. Where it strikes in a finaliser, Python drops the exception; then it is raised
    again at the next safe point.

    Attributes:
        received: The first signal; ``None`` before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}
        self._is_interrupted = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            for number, handler in (
                (signal.SIGUSR1, self._on_signal),
                (signal.SIGTERM, self._on_signal),
                (signal.SIGALRM, self._on_timer),
            ):
                self._before[number] = signal.signal(number, handler)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stop_at(self, where: str) -> None:
        """Stop here if a signal asked for it.

        Args:
            where: For the message, such as ``after round 3``.

        Raises:
            Preempted: See above.
        """
        if self._is_interrupted:
            raise KeyboardInterrupt
        if self.received is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise self._preempted(where)

    def _preempted(self, where: str) -> Preempted:
        assert self.received is not None
        code = REQUEUE_CODE if self.received is signal.SIGUSR1 else 128 + self.received
        return Preempted(f"{self.received.name} stopped the run {where}", code)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return
        self.received = signal.Signals(number)
        seconds = _grace() if self.received is signal.SIGUSR1 else _TERM_SECONDS
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self._is_interrupted = True
        raise KeyboardInterrupt

    def _on_timer(self, number: int, frame: FrameType | None) -> None:
        raise self._preempted("before its next safe point")


def _grace() -> float | None:
    text = os.environ.get(GRACE_VARIABLE)
    return float(text) if text else None
