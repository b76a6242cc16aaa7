"""Laws of what a rule is given, keeps and remembers from round to round."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fellrec.aggregation.examples import (
    NotApplicableError,
    check_round,
    check_same_bits,
    check_unchanged,
    dense,
    example,
    tensors_in,
)
from fellrec.aggregation.laws.law import Subject, as_laws, needs_clients, persisted, state_parts
from fellrec.aggregation.toy import (
    ToyFederation,
    random_clients,
)
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.populations import SharedAndPersonal, SharedModel


def inputs(subject: Subject) -> None:
    """What a rule is given is neither changed nor handed on."""
    for size, seed in subject.cases():
        for index in range(2):
            federation = subject.federation(random_clients(size, seed), seed)
            for earlier in range(index):
                federation.round(earlier)
            updates = dense(federation.updates(index))
            before = {where: value.clone() for where, value in tensors_in(updates)}
            with example(size, index, seed):
                result = federation.rule.aggregate(updates, index)
                check_unchanged(before, updates, "changed")
                for value in dict(result.adapters).values():
                    value.fill_(math.pi)
                check_unchanged(before, updates, "is returned itself, not a copy: what is done to the result changes")


def state(subject: Subject) -> None:
    """Saved in the middle of a run and loaded, a rule continues bit for bit."""
    for size, seed in subject.cases(2):
        clients, cohorts = random_clients(size + 1, seed), _cohorts(subject, size + 1)
        whole, first = subject.federation(clients, seed), subject.federation(clients, seed)
        with example(size + 1, 0, seed):
            for index, cohort in enumerate(cohorts):
                whole.round(index, cohort)
                if index < 2:
                    first.round(index, cohort)
        with example(size + 1, 2, seed), tempfile.TemporaryDirectory() as folder:
            second = subject.federation(clients, seed)
            CheckpointFolder(Path(folder)).save(state_parts(first), 2)
            CheckpointFolder(Path(folder)).load(state_parts(second))
            for index, cohort in list(enumerate(cohorts))[2:]:
                second.round(index, cohort)
            check_same_bits(persisted(whole), persisted(second))


def absent(subject: Subject) -> None:
    """Clients that miss a round keep their own parameters, moments, tensors and what the rule remembers of them."""
    _needs_parts(subject)
    for size, seed in subject.cases(2):
        federation, last = subject.federation(random_clients(size + 1, seed), seed), size
        federation.round(0)
        before = _of_client(federation, last)
        for index in (1, 2):
            with example(size + 1, index, seed):
                federation.round(index, range(size))
                check_same_bits(before, _of_client(federation, last), f"client {last}, which is absent, has another")


def cohorts(subject: Subject) -> None:
    """Every round may have another cohort, also of clients that missed all rounds before."""
    _needs_parts(subject)
    for size, seed in subject.cases(2):
        federation = subject.federation(random_clients(2 * size, seed), seed)
        for index, cohort in enumerate([range(size), range(size, 2 * size), range(0, 2 * size, 2), range(2 * size)]):
            with example(2 * size, index, seed):
                check_round(federation.round(index, cohort), federation)


def _needs_parts(subject: Subject) -> None:
    needs_clients(subject)
    if subject.rule.limits.all_clients:
        raise NotApplicableError("limits.all_clients")


def _cohorts(subject: Subject, size: int) -> list[Sequence[int]]:
    """Of four rounds; clients are absent where the rule and the population allow it."""
    all_rows = range(size)
    if subject.is_pooled or subject.rule.limits.all_clients:
        return [range(1) if subject.is_pooled else all_rows] * 4
    return [all_rows, range(size - 1), range(1, size), all_rows]


def _of_client(federation: ToyFederation, client: int) -> dict[str, Any]:
    """What is a client's own: the server's model is not."""
    population, rule = federation.population, federation.rule
    is_shared = isinstance(population, SharedModel | SharedAndPersonal)
    found: dict[str, Any] = {"rule": _entries(rule.state_dict(), str(client))}
    for row in population.rows_of(client):
        of_server = is_shared and population.is_exchanged(row)
        own = {n: v for n, v in federation.adapter(row).items() if not (of_server and rule.exchanges(n, 0))}
        found[f"row {row}"] = {
            "adapter": own,
            "optimizer": population.optimizer_of(row),
            "tensors": population.tensors_of(row),
        }
    return found


def _entries(value: Any, key: str) -> Any:
    """Entries of a state under a client's number; those of other clients may be about it too, and are left out."""
    if not isinstance(value, Mapping):
        return None
    if value and all(str(name).isdigit() for name in value):
        return {key: value[key]} if key in value else None
    found = {name: _entries(item, key) for name, item in value.items()}
    return {name: item for name, item in found.items() if item is not None} or None


LAWS = as_laws(inputs, state, absent, cohorts)
