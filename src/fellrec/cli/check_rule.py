"""``fellrec check-rule``: the laws that every aggregation rule must keep, checked on a rule."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from fellrec.cli.arguments import add_format, add_overrides

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fellrec.aggregation.conformance import LawResult

PURPOSE = "check an aggregation rule, of your own or of the package, against the laws that all rules must keep"
EXAMPLES = (
    "fellrec check-rule my_rules.MedianOfFriends",
    "fellrec check-rule my_rules.MedianOfFriends +aggregation.friends=5",
    "fellrec check-rule fedadam aggregation.tau=1e-3 --format json",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("rule", metavar="RULE", help="MODULE.CLASS, or a choice of aggregation such as fedavg")
    add_overrides(parser, lists_groups=False)
    add_format(parser)


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb.

    Raises:
        ConfigError: If the rule cannot be imported or does not take its settings.
        FellrecError: If a law is broken.
    """
    node = _node(options.rule, options.overrides)

    import torch

    from fellrec.aggregation.base import AggregationCallback
    from fellrec.aggregation.conformance import check_rule
    from fellrec.config.instantiate import instantiate
    from fellrec.errors import FellrecError

    torch.set_num_threads(1)  # the tensors are tiny
    results = check_rule(lambda: instantiate(node, "aggregation", of=AggregationCallback))
    if options.format == "json":
        found = [asdict(result) for result in results]
        sys.stdout.write(f"{json.dumps({'rule': options.rule, 'laws': found}, indent=2, ensure_ascii=False)}\n")
    else:
        sys.stdout.write("".join(map(_lines, results)) + _total(results))
    failed = [result.law for result in results if result.outcome == "failed"]
    if failed:
        raise FellrecError(f"{options.rule} breaks {len(failed)} of {len(results)} laws: {', '.join(failed)}")


def _node(rule: str, overrides: list[str]) -> DictConfig:
    """The configuration of the rule."""
    from fellrec.config.compose import compose
    from fellrec.config.paths import group_choices
    from fellrec.errors import ConfigError, unknown

    choices = group_choices()["aggregation"]
    if rule not in choices and "." not in rule:
        raise ConfigError(f"{unknown('aggregation', rule, choices)}; a class of your own is named as MODULE.CLASS")
    given = f"aggregation={rule}" if rule in choices else f"aggregation._target_={rule}"
    return compose([given, *overrides]).aggregation


def _total(results: Sequence[LawResult]) -> str:
    """How many laws had each outcome."""
    counts = Counter(result.outcome for result in results)
    return f"{len(results)} laws: {', '.join(f'{count} {outcome}' for outcome, count in counts.most_common())}\n"


def _lines(result: LawResult) -> str:
    """A law, and below it why it did not pass."""
    line = f"{result.outcome:<16}{result.law:<22}{result.text}\n"
    return f"{line}{' ' * 16}{result.reason}\n" if result.reason else line
