"""Laws of cohorts, adapters and losses that are unusual and allowed."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from fellrec.aggregation.examples import (
    RELATIVE,
    LawBrokenError,
    NotApplicableError,
    check_round,
    check_same_figures,
    check_same_models,
    example,
    text_of,
)
from fellrec.aggregation.laws.law import SIZES, Subject, as_laws, needs_clients
from fellrec.aggregation.toy import (
    RANK,
    ToyRound,
    random_adapter,
    random_clients,
    with_loss,
    with_ranks,
)
from fellrec.errors import TrainingError
from fellrec.state.tensor_store import StoredTensors

MANY = 100


def one_client(subject: Subject) -> None:
    """A round may have one client."""
    if subject.least > 1:
        raise NotApplicableError(f"limits.least_clients={subject.least}")
    federation = subject.federation(random_clients(1, 0))
    for index in range(2):
        with example(1, index, 0):
            check_round(federation.round(index), federation)


def many_clients(subject: Subject) -> None:
    """A round may have 100 clients."""
    needs_clients(subject)
    clients = [replace(client, num_steps=1) for client in random_clients(MANY, 0)]
    federation = subject.federation(clients)
    with example(MANY, 0, 0):
        check_round(federation.round(0), federation)


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


def equal_losses(subject: Subject) -> None:
    """Losses may all be 0, or all the same."""
    for size, seed in subject.cases(2):
        for loss in (0.0, 1.0, 1e4):
            federation = subject.federation(with_loss(random_clients(size, seed), loss), seed)
            for index in range(2):
                with example(size, index, seed, f"all losses are {loss:g}"):
                    check_round(federation.round(index), federation)


def mixed_types(subject: Subject) -> None:
    """Adapters keep their types, where parameters are float32 and bfloat16."""
    for size, seed in subject.cases():
        initial = random_adapter("initial", seed)
        initial = {name: value.bfloat16() if "lora_" in name else value for name, value in initial.items()}
        federation = subject.federation(random_clients(size, seed), seed, initial)
        for index in range(2):
            with example(size, index, seed):
                check_round(federation.round(index), federation)


def without_lora(subject: Subject) -> None:
    """Adapters without LoRA's factors are aggregated."""
    if subject.rule.limits.needs_lora:
        raise NotApplicableError("it needs LoRA's factors (limits.needs_lora)")
    for size, seed in subject.cases():
        clients = random_clients(size, seed, with_lora=False)
        federation = subject.federation(clients, seed, random_adapter("initial", seed, with_lora=False))
        for index in range(2):
            with example(size, index, seed, "no LoRA"):
                check_round(federation.round(index), federation)


def ranks(subject: Subject) -> None:
    """Clients may have LoRA ranks of their own, in any order; the same rank for all is as without ranks."""
    if subject.rule.limits.one_rank:
        raise NotApplicableError("it needs the same rank for all clients (limits.one_rank)")
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


LAWS = as_laws(
    one_client,
    many_clients,
    undefined_adapter,
    undefined_loss,
    equal_losses,
    mixed_types,
    without_lora,
    ranks,
    staleness,
)
