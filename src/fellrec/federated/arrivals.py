"""Asynchronous participation: clients train all the time, each from the model that it received last.

The server's model changes whenever enough updates have arrived; that is a round. Who arrives in which round, and which
version of the model each had received, is a pure function of the seed and the settings: it is simulated again after a
resume, and nothing of it is saved.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fellrec.errors import ConfigError
from fellrec.federated.participation import Clients, Measure, Participation
from fellrec.federated.population import Population
from fellrec.federated.records import Cohort
from fellrec.federated.samplers import Sampler
from fellrec.federated.settings import ParticipationSettings
from fellrec.functional.participation import drops_out
from fellrec.functional.rng import derive_seed


class Arrivals(Participation):
    """Cohorts of an asynchronous rule: the clients whose updates arrive between two versions of the server's model.

    ``participation.rate`` of the clients train at the same time. When one has finished or dropped out, another one is
    drawn, which receives the current model. A client whose update has arrived waits until the server's model has taken
    it in. Updates that arrive at the same time are taken in the order of the clients' numbers.

    Args:
        settings: As in ``Participation``; ``over_selection`` has no meaning here.
        seed: Of the run.
        clients: Sizes and speeds.
        sampler: Who is drawn; not one that chooses by loss.
        buffer_size: Updates that change the server's model.

    Raises:
        ConfigError: If there are fewer clients than the buffer holds, or the sampler chooses by loss.
    """

    def __init__(
        self,
        settings: ParticipationSettings,
        seed: int,
        clients: Clients,
        sampler: Sampler | None = None,
        buffer_size: int = 1,
    ) -> None:
        super().__init__(settings, seed, clients, sampler)
        if buffer_size > clients.num:
            raise ConfigError(
                f"aggregation.buffer_size={buffer_size} is not allowed: there are {clients.num} clients, and "
                "each sends one update to a version of the model at most"
            )
        if self.sampler.by_loss:
            raise ConfigError("an asynchronous rule has no cohort to choose by loss: choose another participation=…")
        self.buffer_size = buffer_size
        self._cohorts: list[Cohort] = []
        self._more = _Simulation(self).rounds()

    @property
    def num_drawn(self) -> int:
        """Clients that train at the same time."""
        return self.num_needed

    @property
    def num_aggregated(self) -> int:
        """See ``Participation``."""
        return self.buffer_size

    def check(self, num_rounds: int, least_clients: int = 1) -> None:
        """See ``Participation``."""
        self._cohort(num_rounds - 1)

    def draw(self, population: Population, round_index: int, measure: Measure | None = None) -> Cohort:
        """Whose updates arrive in a round, and the version of the model that each trained from."""
        return self._cohort(round_index)

    def _cohort(self, round_index: int) -> Cohort:
        while len(self._cohorts) <= round_index:
            self._cohorts.append(next(self._more))
        return self._cohorts[round_index]


class _Simulation:
    """The clients and the server on the simulated clock.

    Args:
        how: Clients, sampler and settings.
    """

    def __init__(self, how: Arrivals) -> None:
        self.how = how
        self.now, self.begun = 0.0, 0.0
        self.version, self.num_draws = 0, 0
        self.training: list[tuple[float, int, int, bool]] = []
        """End, client, version that it received, whether it drops out; a heap."""
        self.buffer: list[tuple[int, int]] = []
        """Client and version of the updates that have arrived."""
        self.dropped: list[int] = []
        self.is_busy: NDArray[np.bool_] = np.zeros(how.clients.num, dtype=bool)

    def rounds(self) -> Iterator[Cohort]:
        """All rounds, one after the other."""
        while True:
            self._fill()
            self._advance()
            while len(self.buffer) >= self.how.buffer_size:
                yield self._round()

    def _fill(self) -> None:
        """Let clients begin until as many train as should, or no other client can before the next update arrives."""
        while (missing := self.how.num_needed - len(self.training)) > 0:
            if len(idle := self._idle(self.now)):
                self._begin(idle, min(missing, len(idle)))
            elif (time := self._next_start()) is not None:
                self.now = time
            else:
                break
        if not self.training:
            raise ConfigError(
                f"round {self.version} needs {self.how.buffer_size} updates and has {len(self.buffer)}, but from "
                f"{self.now:g} simulated seconds on no other client is available: give participation.sampler.path more "
                "times or participation.sampler.period, or lower aggregation.buffer_size"
            )

    def _idle(self, time: float) -> NDArray[np.int64]:
        """Who is available, does not train, and has no update in the buffer."""
        return np.flatnonzero(self.how.sampler.available(self.how.clients.num, time) & ~self.is_busy)

    def _next_start(self) -> float | None:
        """The next time at which an idle client is available, if that is before the next update arrives."""
        end = self.training[0][0] if self.training else math.inf
        for time in self.how.sampler.changes(self.now):
            if time >= end:
                return None
            if len(self._idle(time)):
                return time
        return None

    def _begin(self, idle: NDArray[np.int64], count: int) -> None:
        """Draw clients, which train from the current version."""
        how, clients = self.how, self.how.clients
        generator = np.random.default_rng(derive_seed(how.seed, "cohort", self.num_draws))
        drops = drops_out(clients.num, how.settings.dropout, how.seed, self.num_draws)
        self.num_draws += 1
        for client in how.sampler.draw(idle, clients.sizes[idle], count, generator).tolist():
            end = self.now + float(clients.seconds[client])
            heapq.heappush(self.training, (end, client, self.version, bool(drops[client])))
            self.is_busy[client] = True

    def _advance(self) -> None:
        """Go to the next end of a training, and take all updates that arrive then."""
        self.now = self.training[0][0]
        while self.training and self.training[0][0] == self.now:
            _, client, version, is_dropped = heapq.heappop(self.training)
            if is_dropped:
                self.dropped.append(client)
                self.is_busy[client] = False
            else:
                self.buffer.append((client, version))

    def _round(self) -> Cohort:
        """The server takes the updates that arrived first: the next version."""
        size = self.how.buffer_size
        taken, self.buffer = sorted(self.buffer[:size]), self.buffer[size:]
        self.is_busy[[client for client, _ in taken]] = False
        in_use = [version for _, version in self.buffer]
        in_use += [version for _, _, version, is_dropped in self.training if not is_dropped]
        cohort = Cohort(
            round_index=self.version,
            rows=tuple(client for client, _ in taken),
            start_rounds=tuple(version for _, version in taken),
            num_needed=size,
            begun=self.begun,
            seconds=self.now,
            dropped=tuple(sorted(set(self.dropped))),
            oldest=min([self.version + 1, *in_use]),
        )
        self.version, self.begun, self.dropped = self.version + 1, self.now, []
        return cohort
