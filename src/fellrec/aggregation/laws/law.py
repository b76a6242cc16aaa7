"""What a law is, and what it is checked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.examples import (
    NotApplicableError,
)
from fellrec.aggregation.toy import (
    ToyClient,
    ToyFederation,
    random_adapter,
)
from fellrec.federated.populations import OneForAll, SharedAndPersonal, SharedModel

SIZES = (2, 4)
"""Numbers of clients that laws are checked with, or the smallest number that the rule allows."""


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


def as_laws(*checks: Check) -> dict[str, Law]:
    """Functions as laws, by their own names; the first line of a docstring says what holds."""
    texts = [(check.__doc__ or "").split("\n")[0].rstrip(".") for check in checks]
    return {
        check.__name__: Law(check.__name__, text[:1].lower() + text[1:], check)
        for check, text in zip(checks, texts, strict=True)
    }


def needs_clients(subject: Subject) -> None:
    """Leave a law out where one model is trained on pooled data."""
    if subject.is_pooled:
        raise NotApplicableError("one model is trained on the pooled data of all clients")


def state_parts(federation: ToyFederation) -> dict[str, Any]:
    """What a federation would save."""
    return {"population": federation.population, "rule": federation.rule}


def persisted(federation: ToyFederation) -> dict[str, Any]:
    """The states of `state_parts`."""
    return {name: part.state_dict() for name, part in state_parts(federation).items()}
