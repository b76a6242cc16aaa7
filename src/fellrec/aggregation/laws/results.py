"""Laws of what a round gives, and of what it may depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from fellrec.aggregation.examples import (
    LawBrokenError,
    NotApplicableError,
    check_close,
    check_round,
    check_same_bits,
    check_same_figures,
    check_same_models,
    dense,
    example,
    numbers_of,
    text_of,
)
from fellrec.aggregation.laws.law import Subject, as_laws, needs_clients, persisted
from fellrec.aggregation.toy import (
    ToyClient,
    ToyRound,
    random_adapter,
    random_clients,
)
from fellrec.federated.records import Updates


def sees(subject: Subject) -> None:
    """A rule that declares sums or nothing reads and returns no single adapter."""
    if subject.rule.sees == "adapters":
        raise NotApplicableError("it declares sees='adapters'")
    for size, seed in subject.cases():
        federation = subject.federation(random_clients(size, seed), seed)
        with example(size, 0, seed):
            result = federation.round(0).aggregated
            if subject.rule.sees == "nothing" and len(result.adapters):
                raise LawBrokenError(f"it declares sees='nothing' and returned {', '.join(result.adapters)}")


def rows_sum_to_1(subject: Subject) -> None:
    """Each row of a mixing matrix sums to 1."""
    for where, updates, matrix in _matrices(subject):
        sums = matrix.double().sum(dim=1)
        row = int((sums - 1).abs().argmax())
        if abs(float(sums[row]) - 1) > 1e-6:
            found = f"row {row} is {text_of(matrix[row])} and sums to {float(sums[row]):.8g}; {numbers_of(updates)}"
            raise LawBrokenError(f"{where}: {found}")


def rounds(subject: Subject) -> None:
    """Two rounds give adapters, matrices and figures of the right shapes, all finite."""
    for size, seed in subject.cases():
        federation = subject.federation(random_clients(size, seed), seed)
        for index in range(2):
            with example(size, index, seed):
                check_round(federation.round(index), federation)


def weights_not_negative(subject: Subject) -> None:
    """No entry of a mixing matrix is negative."""
    for where, updates, matrix in _matrices(subject):
        row, column = divmod(int(matrix.argmin()), matrix.shape[1])
        if matrix[row, column] < 0:
            raise LawBrokenError(
                f"{where}: receiver {row}, sender {column}: {matrix[row, column]:.6g}; {numbers_of(updates)}"
            )


def order(subject: Subject) -> None:
    """The order of clients in a round changes nothing."""
    needs_clients(subject)
    for size, seed in subject.cases():
        reversed_order = list(range(size))[::-1]
        clients = random_clients(size, seed)
        plain, other = subject.federation(clients, seed), subject.federation(clients, seed)
        for index in range(2):
            with example(size, index, seed):
                expected = plain.round(index)
                updates = other.updates(index, order=reversed_order)
                found = ToyRound(updates, other.finish(updates, index))
                check_same_figures(expected, found, reversed_order)
                check_same_models(
                    plain, other, {row: row for row in range(plain.population.num_rows)}, expected.updates
                )


def permutation(subject: Subject) -> None:
    """If clients change their numbers, their results change with them."""
    needs_clients(subject)
    for size, seed in subject.cases():
        clients = random_clients(size, seed)
        places = [(place + 1) % size for place in range(size)]  # client ``places[n]`` becomes client n
        plain = subject.federation(clients, seed)
        other = subject.federation([clients[place] for place in places], seed)
        rows_of = plain.population.rows_of
        rows = {row: was for n, place in enumerate(places) for row, was in zip(rows_of(n), rows_of(place), strict=True)}
        for index in range(2):
            with example(size, index, seed):
                expected, found = plain.round(index), other.round(index)
                check_same_figures(expected, found, places)
                check_same_models(plain, other, rows, expected.updates)


def repeatable(subject: Subject) -> None:
    """The same round gives the same bits again."""
    for size, seed in subject.cases():
        clients = random_clients(size, seed)
        first, second = subject.federation(clients, seed), subject.federation(clients, seed)
        for index in range(2):
            with example(size, index, seed):
                first.round(index)
                second.round(index)
                check_same_bits(persisted(first), persisted(second))


def no_movement(subject: Subject) -> None:
    """Where no client moves, no model moves."""
    for size, seed in subject.cases():
        initial = random_adapter("initial", seed)
        clients = [ToyClient(initial, num_samples=n + 1, loss=1.0 + n) for n in range(size)]
        federation = subject.federation(clients, seed, initial)
        before = federation.model(0)
        with example(size, 0, seed):
            updates = federation.round(0).updates
            for row in range(federation.population.num_rows):
                check_close(before, federation.model(row), f"row {row}", numbers_of(updates))


def fixed_point(subject: Subject) -> None:
    """Clients that start and end with the same adapter all get it."""
    if subject.is_shared and not subject.has_matrix:
        raise NotApplicableError("the server's model moves by something else than a mean of adapters")
    for size, seed in subject.cases():
        target = random_adapter("target", seed)
        clients = [ToyClient(target, num_samples=n + 1, loss=1.0 + n) for n in range(size)]
        federation = subject.federation(clients, seed)
        with example(size, 0, seed):
            updates = federation.updates(0)
            expected = federation.model(0)
            federation.finish(updates, 0)
            for row in range(federation.population.num_clients if not subject.is_pooled else 1):
                check_close(expected, federation.model(row), f"client {row}", numbers_of(updates))


def equal_ends(subject: Subject) -> None:
    """Clients that end with the same adapter all get it, wherever they started."""
    if subject.rule.keeps_trained:
        raise NotApplicableError("keeps_trained: clients keep what they trained")
    if subject.is_shared or subject.is_pooled:
        raise NotApplicableError("all clients start from one model")
    if subject.rule.sees == "nothing":
        raise NotApplicableError("it declares sees='nothing': clients keep what they trained")
    for size, seed in subject.cases():
        federation = subject.federation(random_clients(size, seed), seed)
        federation.round(0)
        updates = dense(federation.updates(1))
        same = {name: value[:1].repeat(size, *[1] * (value.ndim - 1)) for name, value in updates.end.items()}
        with example(size, 1, seed):
            result = federation.rule.aggregate(replace(updates, start=updates.end, end=same), 1)
            check_close(same, dict(result.adapters), "", numbers_of(updates))


def _matrices(subject: Subject) -> Iterator[tuple[str, Updates, Tensor]]:
    """Where, updates and matrix, of two rounds of every case."""
    if not subject.has_matrix:
        raise NotApplicableError("it has no mixing matrix")
    for size, seed in subject.cases():
        federation = subject.federation(random_clients(size, seed), seed)
        for index in range(2):
            with example(size, index, seed):
                updates = federation.updates(index)
                found = federation.rule.mixing_matrix(updates, index)
            for name, matrix in (found if isinstance(found, Mapping) else {"": found}).items():
                yield f"{size} clients, round {index}, seed {seed}{name and f', group {name}'}", updates, matrix
            if index == 0:
                with example(size, index, seed):
                    federation.finish(updates, index)


LAWS = as_laws(
    sees,
    rows_sum_to_1,
    rounds,
    weights_not_negative,
    order,
    permutation,
    repeatable,
    no_movement,
    fixed_point,
    equal_ends,
)
