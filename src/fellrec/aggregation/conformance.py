"""Checks a rule against all laws, for ``fellrec check-rule`` and for the tests of the package's own rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.examples import LawBrokenError, NotApplicableError
from fellrec.aggregation.laws import FIRST, LAWS, Law, Subject
from fellrec.errors import ConfigError, unknown

Outcome = Literal["passed", "failed", "not applicable", "not checked"]


@dataclass(frozen=True)
class LawResult:
    """What was found about a law.

    Attributes:
        law: Its name.
        text: What it says.
        outcome: Whether it holds.
        reason: The smallest example that breaks it, or why it was not checked; empty if it passed.
    """

    law: str
    text: str
    outcome: Outcome
    reason: str = ""


def check_rule(make: Callable[[], AggregationCallback], seeds: Sequence[int] = (0,)) -> list[LawResult]:
    """Check a rule against all laws.

    Args:
        make: Gives a new rule, each time with the same settings.
        seeds: Of the toy federations; the laws are checked with each.

    Returns:
        One result for each law, in their order. If the rule cannot aggregate a plain round, the other laws are not
        checked.

    Raises:
        ConfigError: If the rule waives a law that does not exist, or the rule's own range checks refuse its settings.

    Example:
        >>> from fellrec.aggregation import FedAvg
        >>> {result.outcome for result in check_rule(FedAvg)} <= {"passed", "not applicable"}
        True
    """
    subject = Subject(make, tuple(seeds))
    for name in subject.rule.waived_laws:
        if name not in LAWS:
            raise ConfigError(f"{subject.rule.name}: {unknown('law in waived_laws', name, LAWS)}")
    found: list[LawResult] = []
    for law in LAWS.values():
        cannot = any(result.outcome == "failed" and result.law in FIRST for result in found)
        if cannot and law.name not in FIRST:
            found.append(LawResult(law.name, law.text, "not checked", "the rule cannot aggregate a plain round"))
        else:
            found.append(_checked(law, subject))
    return found


def _checked(law: Law, subject: Subject) -> LawResult:
    waived = subject.rule.waived_laws.get(law.name)
    if waived is not None:
        return LawResult(law.name, law.text, "not applicable", f"waived by the rule: {waived}")
    try:
        law.check(subject)
    except NotApplicableError as why:
        return LawResult(law.name, law.text, "not applicable", str(why))
    except LawBrokenError as error:
        return LawResult(law.name, law.text, "failed", str(error))
    return LawResult(law.name, law.text, "passed")
