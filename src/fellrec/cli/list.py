"""``fellrec list``: the choices of a configuration group, with their settings."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from fellrec.cli.arguments import add_format

if TYPE_CHECKING:
    from fellrec.config.describe import Choice, Setting

PURPOSE = "list the choices of a configuration group, such as the aggregation rules, with their settings"
EXAMPLES = (
    "fellrec list",
    "fellrec list aggregation",
    "fellrec list aggregation fedprox ditto",
    "fellrec list aggregation --all",
    "fellrec list trainer",
)

_WIDTH = 100
"""Columns of the list of many choices."""
_SHORT = {
    "a whole number of at least ": "whole, ≥ ",
    "a whole number from ": "whole, ",
    "a number of at least ": "≥ ",
    "a number above ": "> ",
    "a number in ": "",
    "a number between 0 and 1": "(0, 1)",
    "a list, each once, of ": "list of ",
}
"""How ranges begin, in words → in the list of many choices."""
_UNBROKEN = "\N{NO-BREAK SPACE}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "group", nargs="?", metavar="GROUP", help="such as aggregation, or GROUP=NAME; without it, all groups"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these choices, with all that is known of them")
    parser.add_argument(
        "--all", action="store_true", help="all that is known of every choice, also of a group with many, aggregation"
    )
    add_format(parser)


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    from fellrec.config.describe import choices
    from fellrec.config.paths import group_choices
    from fellrec.errors import ConfigError, unknown

    if options.group is None:
        groups = group_choices()
        if options.format == "json":
            sys.stdout.write(f"{json.dumps(groups, indent=2)}\n")
        else:
            sys.stdout.writelines(f"{group:<14} {', '.join(names)}\n" for group, names in groups.items())
        return
    group, _, given = options.group.partition("=")
    names = [*filter(None, given.split(",")), *options.names]
    found = {choice.name: choice for choice in choices(group)}
    for name in names:
        if name not in found:
            raise ConfigError(unknown(group, name, found))
    wanted = [found[name] for name in names or found]
    if options.format == "json":
        sys.stdout.write(f"{json.dumps([asdict(choice) for choice in wanted], indent=2, ensure_ascii=False)}\n")
        return
    if not names and not options.all and all("family" in choice.facts for choice in wanted):
        sys.stdout.writelines(f"{line}\n" for line in _overview(group, wanted))
        return
    sys.stdout.write("\n\n".join(_block(group, choice) for choice in wanted) + "\n")


def _block(group: str, choice: Choice) -> str:
    """The text of one choice."""
    head = f"{group}={choice.name}" + (f": {choice.summary}" if choice.summary else "")
    facts = [f"  {title}: {text}" for title, text in choice.facts.items()]
    return "\n".join([head, *facts, *(f"  {_line(setting)}" for setting in choice.settings)])


def _line(setting: Setting) -> str:
    allowed = f" [{setting.allowed}]" if setting.allowed else ""
    return f"{setting.key}={_default(setting)}{allowed}" + (f" {setting.text}" if setting.text else "")


def _default(setting: Setting) -> str:
    return json.dumps(setting.default, ensure_ascii=False) if setting.default != "???" else "(needed)"


def _overview(group: str, choices: Sequence[Choice]) -> Iterator[str]:
    """The lines about a group with many choices, by family, without descriptions of settings."""
    more = (
        f"`fellrec list {group} NAME` describes the settings of one, and what it cannot be combined with; --all of all."
    )
    yield from textwrap.wrap(f"{len(choices)} choices of {group}. {more}", _WIDTH)
    for family in _families(choices):
        yield from ("", family.upper())
        for choice in choices:
            if choice.facts["family"] == family:
                yield from _paragraphs(choice)


def _families(choices: Iterable[Choice]) -> Iterable[str]:
    """The families, in the order in which they are declared, as far as they have choices."""
    from typing import get_args

    from fellrec.aggregation.settings.about import Family

    found = {choice.facts["family"] for choice in choices}
    return [family for family in get_args(Family) if family in found]


def _paragraphs(choice: Choice) -> Iterator[str]:
    """What one choice does; its paper, what it sees and costs; its settings, none of them broken."""
    facts = choice.facts
    title = f" ({facts['in tables']})" if facts["in tables"] != choice.name else ""
    costs = [] if facts["extra cost"] == "none" else [f"extra cost: {facts['extra cost']}"]
    about = " · ".join([facts["paper"], f"sees {facts['sees']}", *costs])
    settings = " · ".join(_brief(setting).replace(" ", _UNBROKEN) for setting in choice.settings)
    yield from textwrap.wrap(f"{choice.name}{title}: {choice.summary}", _WIDTH, subsequent_indent="    ")
    for text in filter(None, (about, settings)):
        for line in textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False):
            yield line.replace(_UNBROKEN, " ")


def _brief(setting: Setting) -> str:
    """Such as ``mu=0.01 [≥ 0]``."""
    allowed = setting.allowed
    for words, sign in _SHORT.items():
        allowed = allowed.replace(words, sign)
    is_interval = allowed[:1] in tuple("[(")
    name = setting.key.rpartition(".")[2]
    return " ".join(
        filter(None, [f"{name}={_default(setting)}", allowed if is_interval or not allowed else f"[{allowed}]"])
    )
