"""Stops a run at a safe point after a signal, so that it can be resumed."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from fellrec.errors import Preempted

REQUEUE_CODE = 75
"""Exit status after SIGUSR1: the job is to be requeued (``EX_TEMPFAIL`` of sysexits.h)."""
GRACE_VARIABLE = "FELLREC_GRACE_SECONDS"
"""Environment variable: seconds between SIGUSR1 and the end of the run; unset: until the next safe point."""
_BETWEEN_INTERRUPTS = 1.0
"""Seconds."""
_TERM_SECONDS = 5.0
"""Seconds between SIGTERM and the end of the run: SLURM kills after 30 (``KillWait``), others after 10."""


class _Interrupt:
    """Handler of SIGINT that raises KeyboardInterrupt, and nothing again within a second.

    Who is impatient presses Ctrl-C several times, and a terminal, a launcher and a scheduler may each send the signal:
    a second KeyboardInterrupt would end the cleaning up after the first.
    """

    def __init__(self) -> None:
        self._last = -_BETWEEN_INTERRUPTS

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last >= _BETWEEN_INTERRUPTS:
            self._last = now
            raise KeyboardInterrupt


INTERRUPT = _Interrupt()
"""Of this process; the command line installs it."""


class StopSignals:
    """Context in which SIGUSR1 and SIGTERM stop the run at the next safe point instead of killing it.

    The `Preemption` callback calls `stop_at` at safe points. If no safe point is reached in time, the run stops
    immediately, as with Ctrl-C, and can be resumed from the newest checkpoint. SLURM sends SIGUSR1 before a time limit
    or pre-emption; the run then has ``FELLREC_GRACE_SECONDS``. SIGTERM is followed by SIGKILL shortly afterwards.

    Ctrl-C stops the run immediately. Python drops exceptions raised in finalisers, so a KeyboardInterrupt is raised
    again at the next safe point.

    Attributes:
        received: The first signal; ``None`` if there was none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[int, Any] = {}
        self._is_interrupted = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for number, handler in (
                (signal.SIGUSR1, self._on_signal),
                (signal.SIGTERM, self._on_signal),
                (signal.SIGALRM, self._on_timer),
            ):
                self._before[number] = signal.signal(number, handler)
            if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, INTERRUPT):
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
        """Stop the run if a signal was received.

        Args:
            where: Position for the message, such as ``after round 3``.

        Raises:
            Preempted: If SIGUSR1 or SIGTERM was received.
            KeyboardInterrupt: If Ctrl-C was received.
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
        INTERRUPT(number, frame)

    def _on_timer(self, number: int, frame: FrameType | None) -> None:
        raise self._preempted("before its next safe point")


def _grace() -> float | None:
    text = os.environ.get(GRACE_VARIABLE)
    return float(text) if text else None
