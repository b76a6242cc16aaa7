"""``fellrec list``: the choices of a configuration group, with their settings."""

from __future__ import annotations

import argparse
import json
import sys
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
    "fellrec list trainer",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "group", nargs="?", metavar="GROUP", help="such as aggregation, or GROUP=NAME; without it, all groups"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these choices")
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
    sys.stdout.write("\n\n".join(_block(group, choice) for choice in wanted) + "\n")


def _block(group: str, choice: Choice) -> str:
    """The text of one choice."""
    head = f"{group}={choice.name}" + (f": {choice.summary}" if choice.summary else "")
    facts = [f"  {title}: {text}" for title, text in choice.facts.items()]
    return "\n".join([head, *facts, *(f"  {_line(setting)}" for setting in choice.settings)])


def _line(setting: Setting) -> str:
    default = json.dumps(setting.default, ensure_ascii=False) if setting.default != "???" else "(needed)"
    allowed = f" [{setting.allowed}]" if setting.allowed else ""
    return f"{setting.key}={default}{allowed}" + (f" {setting.text}" if setting.text else "")
