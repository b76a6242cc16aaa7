"""Who is drawn for a round, or to replace a client that has finished: the choices of ``participation``.

A sampler is a pure function of its arguments; all random numbers come from the generator that it is given.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fellrec.data.readers.table import read_csv
from fellrec.errors import ConfigError, DataError, shorten
from fellrec.federated.settings import (
    BySizeSamplerSettings,
    PoissonSamplerSettings,
    PowerOfChoiceSamplerSettings,
    TraceSamplerSettings,
    UniformSamplerSettings,
)
from fellrec.functional.participation import draw_by_weight

_log = logging.getLogger(__name__)

Clients = NDArray[np.int64]
_COLUMNS = ("client", "start", "end")


class Sampler:
    """Base of what draws clients; a sampler of your own overrides `draw`.

    Attributes:
        by_loss: Whether `draw` gives candidates, of which the clients with the largest loss at the received model are
            chosen.
        is_random_size: Whether `draw` gives a random number of clients, ``count`` on average, all of whom are the
            round's cohort.
    """

    by_loss: bool = False
    is_random_size: bool = False

    def draw(self, clients: Clients, sizes: Clients, count: int, generator: np.random.Generator) -> Clients:
        """Draw clients without replacement.

        Args:
            clients: Those that can be drawn, ascending.
            sizes: Their numbers of training targets.
            count: How many, at most all.
            generator: Of the random numbers of this draw.

        Returns:
            ``count`` of ``clients``, or more if the sampler draws candidates; any number with ``is_random_size``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method draw")

    def check(self, num_clients: int, count: int) -> None:
        """Refuse settings that do not fit the population.

        Args:
            num_clients: C.
            count: Clients that are drawn for a round.

        Raises:
            ConfigError: If they do not.
        """

    def available(self, num_clients: int, seconds: float) -> NDArray[np.bool_]:
        """Which of all clients can be drawn at a simulated time, ``[C]``; all, unless overridden."""
        return np.ones(num_clients, dtype=bool)

    def changes(self, seconds: float) -> Iterator[float]:
        """Later times at which more clients may be available, ascending; if it ends, none follow."""
        return iter(())

    @property
    def fingerprint(self) -> str:
        """What a resumed run must have in common with its start, such as the contents of a file."""
        return ""


class UniformSampler(Sampler, UniformSamplerSettings):
    """Every client with the same probability."""

    def draw(self, clients: Clients, sizes: Clients, count: int, generator: np.random.Generator) -> Clients:
        """See ``Sampler``."""
        return clients[generator.choice(len(clients), count, replace=False)]


class PoissonSampler(Sampler, PoissonSamplerSettings):
    """Every client with the same probability, independently of the others: cohorts differ in size."""

    is_random_size = True

    def draw(self, clients: Clients, sizes: Clients, count: int, generator: np.random.Generator) -> Clients:
        """See ``Sampler``."""
        return clients[generator.random(len(clients)) < count / len(clients)]


class BySizeSampler(Sampler, BySizeSamplerSettings):
    """Clients with probabilities proportional to their numbers of training targets."""

    def draw(self, clients: Clients, sizes: Clients, count: int, generator: np.random.Generator) -> Clients:
        """See ``Sampler``."""
        return clients[draw_by_weight(sizes.astype(np.float64), count, generator)]


class PowerOfChoiceSampler(Sampler):
    """Power of choice (Cho et al., AISTATS 2022): candidates by size, of whom those with the largest loss are chosen.

    Args:
        settings: The number of candidates.
    """

    by_loss = True

    def __init__(self, settings: PowerOfChoiceSamplerSettings) -> None:
        self.num_candidates = settings.num_candidates

    def check(self, num_clients: int, count: int) -> None:
        """See ``Sampler``."""
        if self.num_candidates is not None and not count <= self.num_candidates <= num_clients:
            raise ConfigError(
                f"participation.sampler.num_candidates={self.num_candidates} is not allowed: a whole number from "
                f"{count}, the clients that a round needs, to {num_clients}, all clients"
            )

    def draw(self, clients: Clients, sizes: Clients, count: int, generator: np.random.Generator) -> Clients:
        """See ``Sampler``; gives candidates."""
        wanted = self.num_candidates if self.num_candidates is not None else 2 * count
        return clients[draw_by_weight(sizes.astype(np.float64), min(wanted, len(clients)), generator)]


class TraceSampler(UniformSampler):
    """Uniform among the clients that a file says are available.

    Args:
        settings: The file, and after what time it begins again.

    Raises:
        DataError: If the file cannot be read, or a line of it is not a time in which a client is available.
    """

    def __init__(self, settings: TraceSamplerSettings) -> None:
        self.path = Path(settings.path)
        self.period = settings.period
        self._clients, self._starts, self._ends = _read_trace(self.path, self.period)
        self._changes = np.unique(self._starts)

    def check(self, num_clients: int, count: int) -> None:
        """See ``Sampler``."""
        known = np.unique(self._clients)
        if unknown := known[known >= num_clients].tolist():
            raise ConfigError(
                f"{self.path} names the clients {shorten(', '.join(map(str, unknown)))}: there are {num_clients}, from "
                f"0 to {num_clients - 1}"
            )
        if absent := sorted({*range(num_clients)} - {*known.tolist()}):
            names = shorten(", ".join(map(str, absent)))
            _log.warning("%s has no line for the clients %s: they never take part", self.path, names)

    def available(self, num_clients: int, seconds: float) -> NDArray[np.bool_]:
        """See ``Sampler``."""
        now = math.fmod(seconds, self.period) if self.period else seconds
        found = np.zeros(num_clients, dtype=bool)
        found[self._clients[(self._starts <= now) & (now < self._ends)]] = True
        return found

    def changes(self, seconds: float) -> Iterator[float]:
        """See ``Sampler``; with a period, those of this and the next one."""
        now = math.fmod(seconds, self.period) if self.period else seconds
        starts, begun = self._changes, seconds - now
        times: Iterator[float] = (begun + start for start in starts[starts > now].tolist())
        if self.period:
            times = chain(times, (begun + self.period + start for start in starts.tolist()))
        for time in times:
            if time > seconds:
                yield time
            later = max(time, seconds)
            yield later + 4 * math.ulp(later)  # the sums above may be rounded to just before a start

    @property
    def fingerprint(self) -> str:
        """Of the file's times."""
        found = (self._clients, self._starts, self._ends)
        return hashlib.sha256(b"".join(part.tobytes() for part in found)).hexdigest()[:16]


def _read_trace(path: Path, period: float | None) -> tuple[Clients, NDArray[np.float64], NDArray[np.float64]]:
    """Clients, starts and ends of all lines of a trace."""
    table, locate = read_csv(path)
    if sorted(table.columns) != sorted(_COLUMNS):
        raise DataError(f"{path} has the columns {shorten(', '.join(table.columns))}; needed are {', '.join(_COLUMNS)}")
    if table.empty:
        raise DataError(f"{path} has no lines: no client would ever be available")
    rows = [_window(row, locate(number), period) for number, row in enumerate(table[list(_COLUMNS)].values.tolist())]
    clients, starts, ends = zip(*rows, strict=True)
    return np.array(clients, dtype=np.int64), np.array(starts), np.array(ends)


def _window(row: list[str], where: str, period: float | None) -> tuple[int, float, float]:
    """One line of a trace."""
    client, start, end = row
    try:
        found = int(client), float(start), float(end)
    except ValueError:
        raise DataError(
            f"{where}: {shorten(','.join(row))} is not a client's number and two times in seconds"
        ) from None
    last = math.inf if period is None else period
    if found[0] < 0 or not (0 <= found[1] < found[2] <= last and math.isfinite(found[2])):
        most = "" if period is None else f", at most participation.sampler.period={period}"
        raise DataError(
            f"{where}: {shorten(','.join(row))} is not allowed: a client from 0, and 0 <= start < end{most}"
        )
    return found
