"""Laws of limits, and of a whole run of the real loop."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from fellrec.aggregation.examples import (
    LawBrokenError,
    NotApplicableError,
    check_same_bits,
    example,
)
from fellrec.aggregation.laws.law import Subject, as_laws
from fellrec.aggregation.settings.about import Limits
from fellrec.aggregation.toy import (
    parts_of,
    random_adapter,
    random_clients,
    toy_loop,
)
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.loop import FederatedLoop

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
    "reads_steps": {"privacy": {"unit": "client"}},
    "needs_public_users": {"data": {"public_user_rate": 0}},
}
"""For each field of `Limits` but `least_because`, settings that it excludes."""


def limits(subject: Subject) -> None:
    """What limits exclude is refused with the rule's name, and nothing else is."""
    declared = subject.rule.limits
    name = subject.rule.name
    values = {field.name: getattr(declared, field.name) for field in fields(Limits) if field.name in EXCLUDED}
    claimed = [key for key, value in values.items() if value is True or value not in ("", 0, 1)]
    if not claimed:
        raise NotApplicableError("it declares no limits")
    if found := declared.problems(name, {}):
        raise LawBrokenError(f"refused without a setting that is excluded: {found[0]}")
    for field in claimed:
        found = declared.problems(name, EXCLUDED[field])
        if not any(name in text for text in found):
            raise LawBrokenError(f"limits.{field} does not refuse {EXCLUDED[field]}: {found}")


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


def _ended(loop: FederatedLoop) -> dict[str, Any]:
    """All states of a loop; how a ledger divides its rows among files depends on when it was saved."""
    states = {name: part.state_dict() for name, part in parts_of(loop).items() if name != "ledger"}
    return {**states, "ledger": loop.exchange.ledger.rows()}


LAWS = as_laws(limits, run)
