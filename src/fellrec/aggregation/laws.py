"""The laws that every aggregation rule must keep, each checked on small rounds of a toy federation.

A law that cannot hold for a rule is left out because of what the rule declares: ``limits``, ``sees``, ``population``,
whether it has a mixing matrix, and ``waived_laws``.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.examples import (
    RELATIVE,
    LawBrokenError,
    NotApplicableError,
    check_close,
    check_round,
    check_same_bits,
    check_same_figures,
    check_same_models,
    check_unchanged,
    dense,
    example,
    numbers_of,
    tensors_in,
    text_of,
)
from fellrec.aggregation.settings.about import Limits
from fellrec.aggregation.toy import (
    RANK,
    ToyClient,
    ToyFederation,
    ToyRound,
    parts_of,
    random_adapter,
    random_clients,
    toy_loop,
    with_loss,
    with_ranks,
)
from fellrec.errors import TrainingError
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.populations import OneForAll, SharedAndPersonal, SharedModel
from fellrec.federated.records import Updates
from fellrec.state.tensor_store import StoredTensors

SIZES = (2, 4)
"""Numbers of clients that laws are checked with, or the smallest number that the rule allows."""
MANY = 100


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
        self,
        clients: Sequence[ToyClient],
        seed: int = 0,
        initial: Mapping[str, Tensor] | None = None,
        ranks: Sequence[int] | None = None,
    ) -> ToyFederation:
        """A federation with a new rule."""
        return ToyFederation(self.make(), clients, initial or random_adapter("initial", seed), ranks)


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


def law(check: Check) -> Check:
    """Add a function to the laws, under its own name; the first line of its docstring says what holds."""
    text = (check.__doc__ or "").split("\n")[0].rstrip(".")
    LAWS[check.__name__] = Law(check.__name__, text[:1].lower() + text[1:], check)
    return check


@law
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


@law
def rows_sum_to_1(subject: Subject) -> None:
    """Each row of a mixing matrix sums to 1."""
    for where, updates, matrix in _matrices(subject):
        sums = matrix.double().sum(dim=1)
        row = int((sums - 1).abs().argmax())
        if abs(float(sums[row]) - 1) > 1e-6:
            found = f"row {row} is {text_of(matrix[row])} and sums to {float(sums[row]):.8g}; {numbers_of(updates)}"
            raise LawBrokenError(f"{where}: {found}")


@law
def rounds(subject: Subject) -> None:
    """Two rounds give adapters, matrices and figures of the right shapes, all finite."""
    for size, seed in subject.cases():
        federation = subject.federation(random_clients(size, seed), seed)
        for index in range(2):
            with example(size, index, seed):
                check_round(federation.round(index), federation)


@law
def weights_not_negative(subject: Subject) -> None:
    """No entry of a mixing matrix is negative."""
    for where, updates, matrix in _matrices(subject):
        row, column = divmod(int(matrix.argmin()), matrix.shape[1])
        if matrix[row, column] < 0:
            raise LawBrokenError(
                f"{where}: receiver {row}, sender {column}: {matrix[row, column]:.6g}; {numbers_of(updates)}"
            )


@law
def order(subject: Subject) -> None:
    """The order of clients in a round changes nothing."""
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
                check_same_figures(expected, found, reversed_order)
                check_same_models(
                    plain, other, {row: row for row in range(plain.population.num_rows)}, expected.updates
                )


@law
def permutation(subject: Subject) -> None:
    """If clients change their numbers, their results change with them."""
    _needs_clients(subject)
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


@law
def repeatable(subject: Subject) -> None:
    """The same round gives the same bits again."""
    for size, seed in subject.cases():
        clients = random_clients(size, seed)
        first, second = subject.federation(clients, seed), subject.federation(clients, seed)
        for index in range(2):
            with example(size, index, seed):
                first.round(index)
                second.round(index)
                check_same_bits(_persisted(first), _persisted(second))


@law
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


@law
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


@law
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


@law
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


@law
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
            CheckpointFolder(Path(folder)).save(_parts(first), 2)
            CheckpointFolder(Path(folder)).load(_parts(second))
            for index, cohort in list(enumerate(cohorts))[2:]:
                second.round(index, cohort)
            check_same_bits(_persisted(whole), _persisted(second))


@law
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


@law
def cohorts(subject: Subject) -> None:
    """Every round may have another cohort, also of clients that missed all rounds before."""
    _needs_parts(subject)
    for size, seed in subject.cases(2):
        federation = subject.federation(random_clients(2 * size, seed), seed)
        for index, cohort in enumerate([range(size), range(size, 2 * size), range(0, 2 * size, 2), range(2 * size)]):
            with example(2 * size, index, seed):
                check_round(federation.round(index, cohort), federation)


@law
def one_client(subject: Subject) -> None:
    """A round may have one client."""
    if subject.least > 1:
        raise NotApplicableError(f"limits.least_clients={subject.least}")
    federation = subject.federation(random_clients(1, 0))
    for index in range(2):
        with example(1, index, 0):
            check_round(federation.round(index), federation)


@law
def many_clients(subject: Subject) -> None:
    """A round may have 100 clients."""
    _needs_clients(subject)
    clients = [replace(client, num_steps=1) for client in random_clients(MANY, 0)]
    federation = subject.federation(clients)
    with example(MANY, 0, 0):
        check_round(federation.round(0), federation)


@law
def undefined_adapter(subject: Subject) -> None:
    """A client whose adapter is not finite is refused by its number."""
    for size, seed in subject.cases():
        federation = subject.federation(random_clients(size, seed), seed)
        trained = federation.trained(0)
        last = trained[-1]
        bad = {name: value.clone() for name, value in last.adapter.tensors().items()}
        for value in bad.values():
            value.view(-1)[-1] = float("nan")
        own = {key: value.new_full(value.shape, float("nan")) for key, value in last.tensors.tensors().items()}
        trained[-1] = replace(last, adapter=StoredTensors(bad), tensors=StoredTensors(own))
        try:
            federation.finish(federation.up(trained), 0)
        except TrainingError as error:
            if not re.search(rf"\b{last.row}\b", str(error)):
                raise LawBrokenError(f"{size} clients, client {last.row} has NaN, the message is: {error}") from error
        else:
            raise LawBrokenError(f"{size} clients, client {last.row} has NaN, and the round went through")


@law
def undefined_loss(subject: Subject) -> None:
    """A loss that is not finite is refused, or has no effect on adapters."""
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
                raise LawBrokenError(f"{size} clients, losses {text_of(losses)}: {name} is not finite")


@law
def equal_losses(subject: Subject) -> None:
    """Losses may all be 0, or all the same."""
    for size, seed in subject.cases(2):
        for loss in (0.0, 1.0, 1e4):
            federation = subject.federation(with_loss(random_clients(size, seed), loss), seed)
            for index in range(2):
                with example(size, index, seed, f"all losses are {loss:g}"):
                    check_round(federation.round(index), federation)


@law
def mixed_types(subject: Subject) -> None:
    """Adapters keep their types, where parameters are float32 and bfloat16."""
    for size, seed in subject.cases():
        initial = random_adapter("initial", seed)
        initial = {name: value.bfloat16() if "lora_" in name else value for name, value in initial.items()}
        federation = subject.federation(random_clients(size, seed), seed, initial)
        for index in range(2):
            with example(size, index, seed):
                check_round(federation.round(index), federation)


@law
def without_lora(subject: Subject) -> None:
    """Adapters without LoRA's factors are aggregated."""
    if subject.rule.limits.needs_lora:
        raise NotApplicableError("limits.needs_lora")
    for size, seed in subject.cases():
        clients = random_clients(size, seed, with_lora=False)
        federation = subject.federation(clients, seed, random_adapter("initial", seed, with_lora=False))
        for index in range(2):
            with example(size, index, seed, "no LoRA"):
                check_round(federation.round(index), federation)


@law
def ranks(subject: Subject) -> None:
    """Clients may have LoRA ranks of their own, in any order; the same rank for all is as without ranks."""
    if subject.rule.limits.one_rank:
        raise NotApplicableError("limits.one_rank")
    for size, seed in subject.cases():
        of_client, reversed_order = [1 + client % RANK for client in range(size)], list(range(size))[::-1]
        clients = random_clients(size, seed)
        smaller = with_ranks(clients, of_client)
        plain, other = (subject.federation(smaller, seed, ranks=of_client) for _ in range(2))
        alike, without = subject.federation(clients, seed, ranks=[RANK] * size), subject.federation(clients, seed)
        rows = {row: row for row in range(plain.population.num_rows)}
        for index in range(2):
            with example(size, index, seed, f"ranks {of_client}"):
                expected = plain.round(index)
                check_round(expected, plain)
                updates = other.updates(index, order=reversed_order)
                check_same_figures(expected, ToyRound(updates, other.finish(updates, index)), reversed_order)
                check_same_models(plain, other, rows, expected.updates)
            with example(size, index, seed, f"ranks {[RANK] * size} and none"):
                found = alike.round(index), without.round(index)
                check_same_models(without, alike, rows, found[0].updates)


@law
def staleness(subject: Subject) -> None:
    """An update that was made from an earlier version moves the server's model, and no further than a fresh one."""
    if subject.rule.buffer_of(max(SIZES)) is None:
        raise NotApplicableError("it is not asynchronous")
    for size, seed in subject.cases(1, 2):
        last = math.inf
        for delay in range(4):
            federation = subject.federation(random_clients(size, seed), seed)
            updates = replace(federation.updates(0), start_rounds=(0,) * size)
            with example(size, delay, seed, "updates of round 0"):
                moved = federation.rule.aggregate(updates, delay).adapters
                length = sum(float((moved[n][0] - model).square().sum()) for n, model in updates.model.items())
                if not 0 < length <= last * (1 + RELATIVE):
                    raise LawBrokenError(f"the model moves by {length**0.5:.6g}, by a fresher update {last**0.5:.6g}")
            last = length


EXCLUDED: Mapping[str, Mapping[str, Any]] = {
    "needs_lora": {"adapter": {"_target_": "fellrec.models.adapters.FullAdapter"}},
    "needs_adapter": {"adapter": {"_target_": "fellrec.models.adapters.FullAdapter"}},
    "whole_model": {"split": {"transport": "inprocess"}},
    "no_remote_server": {"split": {"transport": "distributed"}},
    "one_process": {"trainer": {"devices": 2}},
    "all_clients": {"participation": {"rate": 0.5}},
    "least_clients": {"partition": {"num_clients": 1}},
    "no_transforms": {"exchange": {"transforms": [{"_target_": "my.Transform"}]}},
    "changes_base": {"backbone": {"quantize": "nf4"}},
    "asynchronous": {"participation": {"over_selection": 2}},
    "one_rank": {"adapter": {"rank": [2, 4]}},
    "needs_public_users": {"data": {"public_user_rate": 0}},
}
"""For each field of `Limits`, settings that it excludes."""


@law
def limits(subject: Subject) -> None:
    """What limits exclude is refused with the rule's name, and nothing else is."""
    declared = subject.rule.limits
    name = subject.rule.name
    values = {field.name: getattr(declared, field.name) for field in fields(Limits)}
    claimed = [key for key, value in values.items() if value is True or value not in ("", 0, 1)]
    if not claimed:
        raise NotApplicableError("it declares no limits")
    if found := declared.problems(name, {}):
        raise LawBrokenError(f"refused without a setting that is excluded: {found[0]}")
    for field in claimed:
        found = declared.problems(name, EXCLUDED[field])
        if not any(name in text for text in found):
            raise LawBrokenError(f"limits.{field} does not refuse {EXCLUDED[field]}: {found}")


@law
def run(subject: Subject) -> None:
    """A run of the real loop that is stopped and resumed ends as one that is not, bit for bit."""
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
        check_same_bits(_ended(whole), _ended(second))


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
    all_rows = range(size)
    if subject.is_pooled or subject.rule.limits.all_clients:
        return [range(1) if subject.is_pooled else all_rows] * 4
    return [all_rows, range(size - 1), range(1, size), all_rows]


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
    """Entries of a state under a client's number; those of other clients may be about it too, and are left out."""
    if not isinstance(value, Mapping):
        return None
    if value and all(str(name).isdigit() for name in value):
        return {key: value[key]} if key in value else None
    found = {name: _entries(item, key) for name, item in value.items()}
    return {name: item for name, item in found.items() if item is not None} or None
