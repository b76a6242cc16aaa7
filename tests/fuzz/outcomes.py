"""What became of the inputs of a fuzzer: counted, reported, and checked for failures at the end."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from fellrec.errors import FellrecError

OK, REFUSED = "ok", "refused"
_MOST_MEGABYTES = 1024
_SHOWN = 5


class TooSlow(BaseException):
    """Not an `Exception`, so that nothing that is tested catches it."""


class Outcomes:
    """Counts the outcomes of one fuzzer; a context, at whose end every failure is shown and fails the test.

    ``FELLREC_FUZZ_REPORT`` may name a file to which a line of JSON is added for each fuzzer: number of inputs,
    successes, refusals and failures by kind, longest seconds of one input and growth of the memory in MB.

    Args:
        name: Of the fuzzer.
        seconds: Limit for one input.
        letters: Limit of a message.
        foreign: Words that no message may have.
    """

    def __init__(self, name: str, seconds: float = 5.0, letters: int = 3000, foreign: Sequence[str] = ()) -> None:
        self.name, self.seconds, self.letters, self.foreign = name, seconds, letters, ("Traceback", *foreign)
        self.found: Counter[str] = Counter()
        self.failures: dict[str, str] = {}
        self.longest = 0.0
        self._before = _peak_megabytes()

    def __enter__(self) -> Outcomes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        report = os.environ.get("FELLREC_FUZZ_REPORT")
        if report:
            with Path(report).open("a") as file:
                file.write(json.dumps(self.summary(), ensure_ascii=False) + "\n")
        if kind is None:
            shown = "\n\n".join(f"{what}:\n{given}" for what, given in list(self.failures.items())[:_SHOWN])
            assert not self.failures, f"{dict(self.found)}\n{shown}"
            assert _peak_megabytes() - self._before < _MOST_MEGABYTES

    def summary(self) -> dict[str, Any]:
        """The counts as JSON-ready values."""
        return {
            "fuzzer": self.name,
            "inputs": sum(self.found.values()),
            **dict(self.found.most_common()),
            "longest_seconds": round(self.longest, 3),
            "memory_growth_mb": round(_peak_megabytes() - self._before),
            "examples": self.failures,
        }

    def of(self, attempt: Callable[[], Any], given: object = "", check: Callable[[Any], str] = lambda value: OK) -> str:
        """Count one attempt.

        Args:
            attempt: Uses the input.
            given: The input, shown if the attempt fails.
            check: Given the result; ``ok``, another name for a good outcome, or an `AssertionError`.

        Returns:
            The outcome: what ``check`` gives, ``refused``, or what went wrong.
        """
        begin = time.perf_counter()
        try:
            with limited(self.seconds):
                outcome, is_good = check(attempt()), True
        except FellrecError as error:
            outcome, is_good = self._of_message(str(error))
        except TooSlow:
            outcome, is_good = f"more than {self.seconds:g} s", False
        except (Exception, SystemExit) as error:
            outcome, is_good = f"{type(error).__name__} at {_place(error)}", False
            given = f"{given!r}: {str(error)[:300]}"
        self.longest = max(self.longest, time.perf_counter() - begin)
        self.found[outcome] += 1
        if not is_good:
            self.failures.setdefault(outcome, str(given)[:3000])
        return outcome

    def _of_message(self, text: str) -> tuple[str, bool]:
        words = [word for word in self.foreign if word in text]
        if words:
            return f"a message with {words[0]!r}", False
        if not text.strip() or len(text) > self.letters:
            return f"a message of {len(text) // 100 * 100} letters", False
        return REFUSED, True


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `TooSlow` after a time, whatever the process does in Python then."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _place(error: BaseException) -> str:
    """The last line of this package, or of the tests, in a traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames if "fellrec/" in frame.filename]
    return own[-1] if own else "?"


def _peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
