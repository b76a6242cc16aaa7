"""Kinds of populations: whose model a row is, on whose data it trains, and who shares it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fellrec.errors import ConfigError, TrainingError, unknown
from fellrec.federated.population import JobNeeds, Population
from fellrec.federated.records import Cohort, Job
from fellrec.functional.stacks import LazyStack, first_row
from fellrec.state.tensor_store import StoredTensors
from fellrec.types import PUBLIC, Adapter


class OneForAll(Population):
    """One model for all clients, trained on the pooled data of all of them: centralised training."""

    @property
    def num_rows(self) -> int:
        """One."""
        return 1

    @property
    def num_participants(self) -> int:
        """One."""
        return 1

    def data_of(self, row: int) -> int | None:
        """The pooled data."""
        return None

    def served_by(self, client: int) -> int:
        """The one row."""
        return 0


_NO_NEEDS = JobNeeds()
SERVES = ("personal", "shared")
"""Models that `SharedAndPersonal` can evaluate."""


class SharedModel(Population):
    """One model of the server for all clients: every cohort starts from it, clients that missed rounds too.

    Parameters that never leave their clients (``JobNeeds.is_personal``) are the clients' own.
    """

    def receive_adapters(self, rows: Sequence[int], stack: LazyStack) -> None:
        """Let all clients have what came back, which is the same for all of the cohort."""
        share(self, stack)

    def model(self) -> Adapter:
        """See ``Population``."""
        return model_of(self)


def model_of(population: Population) -> Adapter:
    """What the first row of a population has in common with the other shared rows, before it trains in a round."""
    is_personal = population.needs.is_personal
    return {name: t for name, t in population.bank.row(0).items() if is_personal is None or not is_personal(name)}


class ModelVersions(SharedModel):
    """One model of the server, of which clients train earlier versions too: for asynchronous rules.

    Versions are numbered by the round at whose start they were the server's model. They are kept as long as a client
    may still be training from them.
    """

    def __init__(self, initial: Adapter, num_clients: int, needs: JobNeeds = _NO_NEEDS) -> None:
        super().__init__(initial, num_clients, needs)
        self._versions: dict[int, StoredTensors] = {}

    def jobs(self, cohort: Cohort) -> list[Job]:
        """See ``Population``; each with the version that its client received."""
        # Rows become what their clients trained before they receive the next version: now they are all the server's.
        self._versions[cohort.round_index] = self.bank.versions[0]
        jobs = [replace(job, adapter=self._versions[job.round_index]) for job in super().jobs(cohort)]
        self._versions = {number: kept for number, kept in self._versions.items() if number >= cohort.oldest}
        return jobs

    def state_dict(self) -> dict[str, Any]:
        """See ``Persisted``."""
        versions = {str(number): stored for number, stored in self._versions.items()}
        return {**super().state_dict(), "versions": versions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Persisted``."""
        super().load_state_dict(state)
        self._versions = {int(number): stored for number, stored in state["versions"].items()}


def share(population: Population, stack: LazyStack) -> None:
    """Let the first C rows of a population have the adapter that all rows of ``stack`` have in common.

    Parameters that are not in ``stack`` are the clients' own if they are personal; otherwise they were not trained in
    this round, and are the same for all.

    Raises:
        TrainingError: If the rows differ.
    """
    try:
        shared = first_row(stack)
    except ValueError as error:
        raise TrainingError(
            f"the aggregation returned different adapters ({error}) for clients that have one model in common"
        ) from None
    bank, is_personal = population.bank, population.needs.is_personal
    clients = range(population.num_clients)
    if is_personal is None or not any(map(is_personal, bank.kinds)):
        bank.store(0, {**bank.row(0), **shared})
        bank.versions[: population.num_clients] = [bank.versions[0]] * population.num_clients
        return
    for client in clients:
        bank.store(client, {**bank.row(client), **shared})


class AveragedModel(SharedModel):
    """A `SharedModel` of which the mean over all rounds is evaluated and tested; clients start from its last state.

    Row C is the mean; it does not train.
    """

    def __init__(self, initial: Adapter, num_clients: int, needs: JobNeeds = _NO_NEEDS) -> None:
        super().__init__(initial, num_clients, needs)
        self._num_averaged = 0

    @property
    def num_rows(self) -> int:
        """One for each client, and the mean."""
        return self.num_clients + 1

    def served_by(self, client: int) -> int:
        """The mean."""
        return self.num_clients

    def receive_adapters(self, rows: Sequence[int], stack: LazyStack) -> None:
        """Let all clients have what came back, and add it to the mean."""
        super().receive_adapters(rows, stack)
        self._num_averaged += 1
        mean, latest = self.bank.row(self.num_clients), self.bank.row(0)
        weight = 1 / self._num_averaged
        averaged = {n: (mean[n].double() + weight * (latest[n].double() - mean[n].double())).to(mean[n]) for n in mean}
        self.bank.store(self.num_clients, averaged)

    def state_dict(self) -> dict[str, Any]:
        """With the number of rounds in the mean."""
        return {**super().state_dict(), "num_averaged": self._num_averaged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        super().load_state_dict(state)
        self._num_averaged = state["num_averaged"]


class SharedAndRoot(SharedModel):
    """A `SharedModel` that the server trains too, on the public users, in every round: see ``Updates.root``.

    Row C is the server's. It trains from the same model as the cohort, is never aggregated and serves no client.
    """

    @property
    def num_rows(self) -> int:
        """One for each client, and the server's."""
        return self.num_clients + 1

    @property
    def server_rows(self) -> tuple[int, ...]:
        """The last row."""
        return (self.num_clients,)

    def data_of(self, row: int) -> int | None:
        """The public users for the server."""
        return PUBLIC if row == self.num_clients else row

    def receive_adapters(self, rows: Sequence[int], stack: LazyStack) -> None:
        """Let the server's row have what all clients get."""
        super().receive_adapters(rows, stack)
        self.bank.store(self.num_clients, {**self.bank.row(self.num_clients), **first_row(stack)})


class SharedAndPersonal(Population):
    """Two models a client: row ``c`` is client ``c``'s copy of the shared model, row ``C + c`` its personal model.

    Both train on the client's data in every round that the client takes part in. Shared rows are aggregated, and all
    of them receive the result, see `SharedModel`; personal rows never leave their client, and their jobs have the
    shared model that the client received as the anchor ``"shared"``.

    Args:
        initial: As in ``Population``.
        num_clients: As in ``Population``.
        needs: As in ``Population``.
        serves: Which of the two is evaluated and tested: ``"personal"`` or ``"shared"``.
    """

    def __init__(
        self, initial: Adapter, num_clients: int, needs: JobNeeds = _NO_NEEDS, serves: str = "personal"
    ) -> None:
        super().__init__(initial, num_clients, needs)
        if serves not in SERVES:
            raise ConfigError(unknown("value of serves", serves, SERVES))
        self.serves = serves

    @property
    def num_rows(self) -> int:
        """Two for each client."""
        return 2 * self.num_clients

    def rows_of(self, participant: int) -> tuple[int, ...]:
        """The client's shared and personal row."""
        return participant, self.num_clients + participant

    def data_of(self, row: int) -> int | None:
        """The client's data for both."""
        return row % self.num_clients

    def served_by(self, client: int) -> int:
        """See ``serves``."""
        return client if self.serves == "shared" else self.num_clients + client

    def is_exchanged(self, row: int) -> bool:
        """Shared rows only."""
        return row < self.num_clients

    def receive_adapters(self, rows: Sequence[int], stack: LazyStack) -> None:
        """Let all shared rows have what came back."""
        share(self, stack)

    def model(self) -> Adapter:
        """See ``Population``."""
        return model_of(self)

    def anchors(self, row: int) -> dict[str, StoredTensors]:
        """A personal row's anchor is the shared model that its client received."""
        return {} if self.is_exchanged(row) else {"shared": self.bank.versions[row - self.num_clients]}
