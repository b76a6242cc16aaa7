"""The laws that every aggregation rule must keep, each checked on small rounds of a toy federation.

A law that cannot hold for a rule is left out because of what the rule declares: ``limits``, ``sees``, ``population``,
whether it has a mixing matrix, and ``waived_laws``.
"""

from __future__ import annotations

import math
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.about import Limits
from fellrec.aggregation.toy import (
    ToyClient,
    ToyFederation,
    ToyRound,
    parts_of,
    random_adapter,
    random_clients,
    toy_loop,
    with_loss,
)
from fellrec.errors import TrainingError
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.populations import OneForAll, SharedAndPersonal, SharedModel
from fellrec.federated.records import SumsOnly, Updates
from fellrec.functional.stacks import LazyStack, as_lazy
from fellrec.state.tensor_store import StoredTensors

SIZES = (2, 4)
"""Numbers of clients that laws are checked with, or the smallest number that the rule allows."""
MANY = 100
RELATIVE, ABSOLUTE = 1e-5, 1e-6
"""Tolerances of figures that are computed in another order."""
_METRIC_NAME = re.compile(r"[\w./: -]+")


class LawBrokenError(Exception):
    """A law does not hold; the message is the smallest example that was found."""


class NotApplicableError(Exception):
    """A law says nothing about a rule; the message is what the rule declares."""


@dataclass(frozen=True)
class Subject:
    """A rule that is checked.

    Attributes:
        make: Gives a new rule with the same settings.
        seeds: Of the toy federations.
    """

    make: Callable[[], AggregationCallback]
    seeds: Sequence[int] = (0,)

    @cached_property
    def rule(self) -> AggregationCallback:
        """One rule, for what it declares."""
        return self.make()

    @property
    def is_pooled(self) -> bool:
        """Whether there is one model, trained on pooled data."""
        return issubclass(self.rule.population, OneForAll)

    @property
    def is_shared(self) -> bool:
        """Whether the server has one model, which every cohort starts from."""
        return issubclass(self.rule.population, SharedModel | SharedAndPersonal)

    @property
    def has_matrix(self) -> bool:
        """Whether the rule defines `mixing_matrix`."""
        return type(self.rule).mixing_matrix is not AggregationCallback.mixing_matrix

    @property
    def least(self) -> int:
        """Smallest number of clients in a round."""
        return self.rule.limits.least_clients

    def cases(self, *more: int) -> Iterator[tuple[int, int]]:
        """Number of clients and seed, the smallest first: `SIZES`, or other numbers."""
        sizes = sorted({max(size, self.least) for size in more or SIZES})
        return ((size, seed) for size in sizes for seed in self.seeds)

    def federation(
        self, clients: Sequence[ToyClient], seed: int = 0, initial: Mapping[str, Tensor] | None = None
    ) -> ToyFederation:
        """A federation with a new rule."""
        return ToyFederation(self.make(), clients, initial or random_adapter("initial", seed))


Check = Callable[[Subject], None]


@dataclass(frozen=True)
class Law:
    """A law.

    Attributes:
        name: As in ``AggregationCallback.waived_laws``.
        text: What holds, in one line.
        check: Raises `LawBrokenError` or `NotApplicableError`.
    """

    name: str
    text: str
    check: Check


LAWS: dict[str, Law] = {}
"""All laws by name, in the order in which they are checked."""
FIRST = ("sees", "rows_sum_to_1", "rounds")
"""Laws without which the others cannot be checked."""


def law(text: str) -> Callable[[Check], Check]:
    """Add a function to the laws, under its own name."""

    def add(check: Check) -> Check:
        LAWS[check.__name__] = Law(check.__name__, text, check)
        return check

    return add


@law("a rule that declares sums or nothing reads and returns no single adapter")
def sees(subject: Subject) -> None:
    if subject.rule.sees == "adapters":
        raise NotApplicableError("it declares sees='adapters'")
    for size, seed in subject.cases():
        federation = subject.federation(random_clients(size, seed), seed)
        with example(size, 0, seed):
            result = federation.round(0).aggregated
            if subject.rule.sees == "nothing" and len(result.adapters):
                raise LawBrokenError(f"it declares sees='nothing' and returned {', '.join(result.adapters)}")


@law("each row of a mixing matrix sums to 1")
def rows_sum_to_1(subject: Subject) -> None:
    for where, updates, matrix in _matrices(subject):
        sums = matrix.double().sum(dim=1)
        row = int((sums - 1).abs().argmax())
        if abs(float(sums[row]) - 1) > 1e-6:
            found = f"row {row} is {_text(matrix[row])} and sums to {float(sums[row]):.8g}; {_numbers(updates)}"
            raise LawBrokenError(f"{where}: {found}")


@law("two rounds give adapters, matrices and figures of the right shapes, all finite")
def rounds(subject: Subject) -> None:
    for size, seed in subject.cases():
        federation = subject.federation(random_clients(size, seed), seed)
        for index in range(2):
            with example(size, index, seed):
                _check_round(federation.round(index), federation)


@law("no entry of a mixing matrix is negative")
def weights_not_negative(subject: Subject) -> None:
    for where, updates, matrix in _matrices(subject):
        row, column = divmod(int(matrix.argmin()), matrix.shape[1])
        if matrix[row, column] < 0:
            raise LawBrokenError(
                f"{where}: receiver {row}, sender {column}: {matrix[row, column]:.6g}; {_numbers(updates)}"
            )


@law("the order of clients in a round changes nothing")
def order(subject: Subject) -> None:
    _needs_clients(subject)
    for size, seed in subject.cases():
        reversed_order = list(range(size))[::-1]
        clients = random_clients(size, seed)
        plain, other = subject.federation(clients, seed), subject.federation(clients, seed)
        for index in range(2):
            with example(size, index, seed):
                expected = plain.round(index)
                updates = other.updates(index, order=reversed_order)
                found = ToyRound(updates, other.finish(updates, index))
                _same_figures(expected, found, reversed_order)
                _same_models(plain, other, list(range(plain.population.num_rows)), expected.updates)


@law("if clients change their numbers, their results change with them")
def permutation(subject: Subject) -> None:
    _needs_clients(subject)
    for size, seed in subject.cases():
        clients = random_clients(size, seed)
        places = [(place + 1) % size for place in range(size)]  # client ``places[n]`` becomes client n
        plain = subject.federation(clients, seed)
        other = subject.federation([clients[place] for place in places], seed)
        rows = [size * (row // size) + places[row % size] for row in range(plain.population.num_rows)]
        for index in range(2):
            with example(size, index, seed):
                expected, found = plain.round(index), other.round(index)
                _same_figures(expected, found, places)
                _same_models(plain, other, rows, expected.updates)


@law("the same round gives the same bits again")
def repeatable(subject: Subject) -> None:
    for size, seed in subject.cases():
        clients = random_clients(size, seed)
        first, second = subject.federation(clients, seed), subject.federation(clients, seed)
        for index in range(2):
            with example(size, index, seed):
                first.round(index)
                second.round(index)
                _same_bits(_persisted(first), _persisted(second))


@law("where no client moves, no model moves")
def no_movement(subject: Subject) -> None:
    for size, seed in subject.cases():
        initial = random_adapter("initial", seed)
        clients = [ToyClient(initial, num_samples=n + 1, loss=1.0 + n) for n in range(size)]
        federation = subject.federation(clients, seed, initial)
        before = federation.model(0)
        with example(size, 0, seed):
            updates = federation.round(0).updates
            for row in range(federation.population.num_rows):
                _close(before, federation.model(row), f"row {row}", _numbers(updates))


@law("clients that start and end with the same adapter all get it")
def fixed_point(subject: Subject) -> None:
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
                _close(expected, federation.model(row), f"client {row}", _numbers(updates))


@law("clients that end with the same adapter all get it, wherever they started")
def equal_ends(subject: Subject) -> None:
    if subject.is_shared or subject.is_pooled:
        raise NotApplicableError("all clients start from one model")
    if subject.rule.sees == "nothing":
        raise NotApplicableError("it declares sees='nothing': clients keep what they trained")
    for size, seed in subject.cases():
        federation = subject.federation(random_clients(size, seed), seed)
        federation.round(0)
        updates = _dense(federation.updates(1))
        same = {name: value[:1].repeat(size, *[1] * (value.ndim - 1)) for name, value in updates.end.items()}
        with example(size, 1, seed):
            result = federation.rule.aggregate(replace(updates, end=same), 1)
            _close(same, dict(result.adapters), "", _numbers(updates))


@law("what a rule is given is neither changed nor handed on")
def inputs(subject: Subject) -> None:
    for size, seed in subject.cases():
        for index in range(2):
            federation = subject.federation(random_clients(size, seed), seed)
            for earlier in range(index):
                federation.round(earlier)
            updates = _dense(federation.updates(index))
            before = {where: value.clone() for where, value in _tensors(updates)}
            with example(size, index, seed):
                result = federation.rule.aggregate(updates, index)
                _unchanged(before, updates, "changed")
                for value in dict(result.adapters).values():
                    value.fill_(math.pi)
                _unchanged(before, updates, "is returned itself, not a copy: what is done to the result changes")


@law("saved in the middle of a run and loaded, a rule continues bit for bit")
def state(subject: Subject) -> None:
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
            CheckpointFolder(Path(folder)).save(_parts(first), 2)
            CheckpointFolder(Path(folder)).load(_parts(second))
            for index, cohort in list(enumerate(cohorts))[2:]:
                second.round(index, cohort)
            _same_bits(_persisted(whole), _persisted(second))


@law("clients that miss a round keep their own parameters, moments, tensors and what the rule remembers of them")
def absent(subject: Subject) -> None:
    _needs_parts(subject)
    for size, seed in subject.cases(2):
        size += 1
        federation = subject.federation(random_clients(size, seed), seed)
        federation.round(0)
        before = _of_client(federation, size - 1)
        for index in (1, 2):
            with example(size, index, seed):
                federation.round(index, range(size - 1))
                _same_bits(before, _of_client(federation, size - 1), f"client {size - 1}, which is absent, has another")


@law("every round may have another cohort, also of clients that missed all rounds before")
def cohorts(subject: Subject) -> None:
    _needs_parts(subject)
    for size, seed in subject.cases(2):
        federation = subject.federation(random_clients(2 * size, seed), seed)
        for index, cohort in enumerate([range(size), range(size, 2 * size), range(0, 2 * size, 2), range(2 * size)]):
            with example(2 * size, index, seed):
                _check_round(federation.round(index, cohort), federation)


@law("a round may have one client")
def one_client(subject: Subject) -> None:
    if subject.least > 1:
        raise NotApplicableError(f"limits.least_clients={subject.least}")
    federation = subject.federation(random_clients(1, 0))
    for index in range(2):
        with example(1, index, 0):
            _check_round(federation.round(index), federation)


@law("a round may have 100 clients")
def many_clients(subject: Subject) -> None:
    _needs_clients(subject)
    clients = [replace(client, num_steps=1) for client in random_clients(MANY, 0)]
    federation = subject.federation(clients)
    with example(MANY, 0, 0):
        _check_round(federation.round(0), federation)


@law("a client whose adapter is not finite is refused by its number")
def undefined_adapter(subject: Subject) -> None:
    for size, seed in subject.cases():
        federation = subject.federation(random_clients(size, seed), seed)
        trained = federation.trained(0)
        last = trained[-1]
        bad = {name: value.clone() for name, value in last.adapter.tensors().items()}
        for value in bad.values():
            value.view(-1)[-1] = float("nan")
        trained[-1] = replace(last, adapter=StoredTensors(bad))
        try:
            federation.finish(federation.exchange.up(trained), 0)
        except TrainingError as error:
            if not re.search(rf"\b{last.row}\b", str(error)):
                raise LawBrokenError(f"{size} clients, client {last.row} has NaN, the message is: {error}") from error
        else:
            raise LawBrokenError(f"{size} clients, client {last.row} has NaN, and the round went through")


@law("a loss that is not finite is refused, or has no effect on adapters")
def undefined_loss(subject: Subject) -> None:
    for size, seed in subject.cases():
        federation = subject.federation(random_clients(size, seed), seed)
        updates = federation.updates(0)
        losses = updates.losses.clone()
        losses[0] = float("nan")
        start_losses = None if updates.start_losses is None else losses
        try:
            result = federation.rule.aggregate(replace(updates, losses=losses, start_losses=start_losses), 0)
        except TrainingError:
            continue
        for name, value in dict(result.adapters).items():
            if not bool(value.isfinite().all()):
                raise LawBrokenError(f"{size} clients, losses {_text(losses)}: {name} is not finite")


@law("losses may all be 0, or all the same")
def equal_losses(subject: Subject) -> None:
    for size, seed in subject.cases(2):
        for loss in (0.0, 1.0, 1e4):
            federation = subject.federation(with_loss(random_clients(size, seed), loss), seed)
            for index in range(2):
                with example(size, index, seed, f"all losses are {loss:g}"):
                    _check_round(federation.round(index), federation)


@law("adapters keep their types, where parameters are float32 and bfloat16")
def mixed_types(subject: Subject) -> None:
    for size, seed in subject.cases():
        initial = random_adapter("initial", seed)
        initial = {name: value.bfloat16() if "lora_" in name else value for name, value in initial.items()}
        federation = subject.federation(random_clients(size, seed), seed, initial)
        for index in range(2):
            with example(size, index, seed):
                _check_round(federation.round(index), federation)


@law("adapters without LoRA's factors are aggregated")
def without_lora(subject: Subject) -> None:
    if subject.rule.limits.needs_lora:
        raise NotApplicableError("limits.needs_lora")
    for size, seed in subject.cases():
        clients = random_clients(size, seed, with_lora=False)
        federation = subject.federation(clients, seed, random_adapter("initial", seed, with_lora=False))
        for index in range(2):
            with example(size, index, seed, "no LoRA"):
                _check_round(federation.round(index), federation)


EXCLUDED: Mapping[str, Mapping[str, Any]] = {
    "needs_lora": {"adapter": {"_target_": "fellrec.models.adapters.FullAdapter"}},
    "whole_model": {"split": {"transport": "inprocess"}},
    "no_remote_server": {"split": {"transport": "distributed"}},
    "one_process": {"trainer": {"devices": 2}},
    "all_clients": {"participation": {"rate": 0.5}},
    "least_clients": {"partition": {"num_clients": 1}},
    "no_transforms": {"exchange": {"transforms": [{"_target_": "my.Transform"}]}},
    "changes_base": {"backbone": {"quantize": "nf4"}},
}
"""For each field of `Limits`, settings that it excludes."""


@law("what limits exclude is refused with the rule's name, and nothing else is")
def limits(subject: Subject) -> None:
    declared = subject.rule.limits
    name, default = subject.rule.name, Limits()
    claimed = [field.name for field in fields(Limits) if getattr(declared, field.name) != getattr(default, field.name)]
    if not claimed:
        raise NotApplicableError("it declares no limits")
    if found := declared.problems(name, {}):
        raise LawBrokenError(f"refused without a setting that is excluded: {found[0]}")
    for field in claimed:
        found = declared.problems(name, EXCLUDED[field])
        if not any(name in text for text in found):
            raise LawBrokenError(f"limits.{field} does not refuse {EXCLUDED[field]}: {found}")


@law("a run of the real loop that is stopped and resumed ends as one that is not, bit for bit")
def run(subject: Subject) -> None:
    rate = 1.0 if subject.rule.limits.all_clients else 0.5
    size = max(3, subject.least) if rate == 1.0 else 2 * max(2, subject.least)
    clients = random_clients(size, 0)
    initial = {n: v * ("lora_B" not in n) for n, v in random_adapter("initial", 0).items()}  # B is 0, as in real runs
    whole, first, second = (toy_loop(subject.make(), clients, initial, 4, rate) for _ in range(3))
    with example(size, 0, 0, f"participation.rate={rate:g}"):
        whole.run()
        first.validate(-1)
        for index in range(2):
            first.run_round(index)
    with example(size, 2, 0, f"participation.rate={rate:g}"), tempfile.TemporaryDirectory() as folder:
        CheckpointFolder(Path(folder)).save(parts_of(first), 2)
        CheckpointFolder(Path(folder)).load(parts_of(second))
        second.run()
        _same_bits(*(_ended(loop) for loop in (whole, second)))


@contextmanager
def example(num_clients: int, round_index: int, seed: int, more: str = "") -> Iterator[None]:
    """Name the example in whatever is raised; other errors than ours break the law."""
    where = f"{num_clients} client{'s' * (num_clients != 1)}, round {round_index}, seed {seed}"
    where = f"{where}, {more}" if more else where
    try:
        yield
    except LawBrokenError as error:
        raise LawBrokenError(f"{where}: {error}") from error
    except Exception as error:
        raise LawBrokenError(f"{where}: {type(error).__name__}: {error}{_place(error)}") from error


def _place(error: Exception) -> str:
    """The last line of code outside this package and other libraries, in brackets; empty if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not ({"fellrec", "site-packages"} & set(Path(frame.filename).parts))]
    return f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""


def _needs_clients(subject: Subject) -> None:
    if subject.is_pooled:
        raise NotApplicableError("one model is trained on the pooled data of all clients")


def _needs_parts(subject: Subject) -> None:
    _needs_clients(subject)
    if subject.rule.limits.all_clients:
        raise NotApplicableError("limits.all_clients")


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


def _cohorts(subject: Subject, size: int) -> list[Sequence[int]]:
    """Of four rounds; clients are absent where the rule and the population allow it."""
    everybody = range(size)
    if subject.is_pooled or subject.rule.limits.all_clients:
        return [range(1) if subject.is_pooled else everybody] * 4
    return [everybody, range(size - 1), range(1, size), everybody]


def _parts(federation: ToyFederation) -> dict[str, Any]:
    return {"population": federation.population, "rule": federation.rule}


def _persisted(federation: ToyFederation) -> dict[str, Any]:
    return {name: part.state_dict() for name, part in _parts(federation).items()}


def _ended(loop: FederatedLoop) -> dict[str, Any]:
    """All states of a loop; how a ledger divides its rows among files depends on when it was saved."""
    states = {name: part.state_dict() for name, part in parts_of(loop).items() if name != "ledger"}
    return {**states, "ledger": loop.exchange.ledger.rows()}


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
    """Entries of a state under a client's number, at any depth."""
    if not isinstance(value, Mapping):
        return None
    found = {name: item if name == key else _entries(item, key) for name, item in value.items()}
    return {name: item for name, item in found.items() if item is not None} or None


def _check_round(found: ToyRound, federation: ToyFederation) -> None:
    """Refuse a result with a wrong shape or type, or a figure that is not finite."""
    updates, aggregated = found.updates, found.aggregated
    size, kinds = len(updates.clients), federation.initial
    numbers = _numbers(updates)
    for name, value in dict(aggregated.adapters).items():
        if name not in kinds:
            raise LawBrokenError(f"{name} is returned, which is not a parameter of the adapter")
        if tuple(value.shape) != (size, *kinds[name].shape):
            raise LawBrokenError(f"{name} is {list(value.shape)}, needed is {[size, *kinds[name].shape]}")
        if value.dtype != kinds[name].dtype:
            raise LawBrokenError(f"{name} is {value.dtype}, needed is {kinds[name].dtype}")
        if not bool(value.isfinite().all()):
            raise LawBrokenError(f"{name} is not finite: {_text(value)}; {numbers}")
    figures = [(name, value, (size, size)) for name, value in aggregated.matrices.items()]
    for name, value, shape in [*figures, *((n, v, (size,)) for n, v in aggregated.per_client.items())]:
        if tuple(value.shape) != shape:
            raise LawBrokenError(f"{name} is {list(value.shape)}, needed is {list(shape)}")
        if not bool(value.isfinite().all()):
            raise LawBrokenError(f"{name} is not finite: {_text(value)}; {numbers}")
    for name, figure in aggregated.metrics.items():
        if not _METRIC_NAME.fullmatch(name) or not math.isfinite(figure):
            raise LawBrokenError(f"the metric {name!r} is {figure}: needed is a finite number with a name for MLflow")


def _same_figures(expected: ToyRound, found: ToyRound, places: Sequence[int]) -> None:
    """Refuse matrices and vectors that did not move with the clients; client n of ``found`` is ``places[n]``."""
    for name, matrix in expected.aggregated.matrices.items():
        wanted = {name: matrix[places][:, places]}
        _close(wanted, {name: found.aggregated.matrices[name]}, "", _numbers(expected.updates))
    for name, vector in expected.aggregated.per_client.items():
        _close({name: vector[places]}, {name: found.aggregated.per_client[name]}, "", _numbers(expected.updates))


def _same_models(plain: ToyFederation, other: ToyFederation, rows: Sequence[int], updates: Updates) -> None:
    """Refuse models that differ; row n of ``other`` is ``rows[n]`` of ``plain``."""
    for row, place in enumerate(rows):
        _close(plain.model(place), other.model(row), f"client {place % len(plain.clients)}", _numbers(updates))


def _close(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str, numbers: str) -> None:
    """Refuse figures that differ by more than rounding, naming the one that differs most."""
    for name, value in expected.items():
        if name not in found:
            continue  # a parameter that is not returned stays as it was trained
        wanted, got = value.double(), found[name].double()
        excess = (got - wanted).abs() - ABSOLUTE - RELATIVE * wanted.abs()
        if not bool((excess <= 0).all()):
            place = int(excess.nan_to_num(torch.inf).argmax())
            index = [int(i) for i in torch.unravel_index(torch.tensor(place), wanted.shape)]
            figures = f"{float(got.reshape(-1)[place]):.6g}, expected {float(wanted.reshape(-1)[place]):.6g}"
            raise LawBrokenError(f"{where}{where and ', '}{name}{index}: {figures}; {numbers}")


def _same_bits(expected: Any, found: Any, what: str = "", where: str = "") -> None:
    """Refuse states that differ."""
    what = what or "another"
    if isinstance(expected, StoredTensors) and isinstance(found, StoredTensors):
        return _same_bits(expected.tensors(), found.tensors(), what, where)
    if isinstance(expected, Mapping) and isinstance(found, Mapping) and expected.keys() == found.keys():
        for key in expected:
            _same_bits(expected[key], found[key], what, f"{where}/{key}" if where else str(key))
    elif isinstance(expected, list | tuple) and isinstance(found, list | tuple) and len(expected) == len(found):
        for place, item in enumerate(expected):
            _same_bits(item, found[place], what, f"{where}/{place}")
    elif isinstance(expected, Tensor) and isinstance(found, Tensor):
        if not torch.equal(expected, found):
            raise LawBrokenError(f"{what} {where}: {_text(found)}, expected {_text(expected)}")
    elif not (type(expected) is type(found) and (expected == found or expected != expected)):
        raise LawBrokenError(f"{what} {where}: {found!r}, expected {expected!r}")
    return None


def _dense(value: Any) -> Any:
    """The same with tensors in memory instead of stacks that are read."""
    if isinstance(value, Updates):
        return replace(value, **{field.name: _dense(getattr(value, field.name)) for field in fields(value)})
    if isinstance(value, SumsOnly):
        return SumsOnly(dict(value.hidden), value.rule)
    if isinstance(value, LazyStack):
        return dict(value)
    return {name: _dense(item) for name, item in value.items()} if isinstance(value, Mapping) else value


def _tensors(value: Any, where: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in updates, by what they are."""
    if isinstance(value, Tensor):
        yield where, value
    elif isinstance(value, Updates):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name), field.name)
    elif isinstance(value, SumsOnly):
        yield from ((f"{where} {name}", value.hidden.block(name, slice(None))) for name in value.hidden)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _tensors(item, f"{where} {name}")


def _unchanged(before: Mapping[str, Tensor], updates: Updates, how: str) -> None:
    for where, value in _tensors(updates):
        if not torch.equal(value, before[where]):
            raise LawBrokenError(f"updates.{where} {how}: {_text(value)}, was {_text(before[where])}")


def _numbers(updates: Updates) -> str:
    return f"losses {_text(updates.losses)}, samples {_text(updates.num_samples)}"


def _text(values: Tensor) -> str:
    shown = [f"{value:.4g}" for value in values.double().reshape(-1)[:6].tolist()]
    return f"[{', '.join([*shown, *['…'] * (values.numel() > len(shown))])}]"
