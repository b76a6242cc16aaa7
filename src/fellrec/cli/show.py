"""``fellrec show``: every setting of a choice, with default, range and description."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from fellrec.cli.arguments import add_format

if TYPE_CHECKING:
    from fellrec.config.describe import Choice

PURPOSE = "show every setting of a configuration group or choice: default, range, description"
EXAMPLES = (
    "fellrec show trainer",
    "fellrec show aggregation=fedprox",
    "fellrec show backbone=hf --format json",
)
_WIDTH = 80
"""Columns of the text."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("group", metavar="GROUP[=CHOICE]", help="without CHOICE, the one that a run has by default")
    add_format(parser)


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    from fellrec.config.describe import choices, default_choice, group_named
    from fellrec.errors import ConfigError, unknown

    group, _, name = options.group.partition("=")
    group = group_named(group)
    found = {choice.name: choice for choice in choices(group)}
    name = name or default_choice(group) or ""
    if not name:
        raise ConfigError(f"{group} has no choice of its own in every run: give one, {group}={', '.join(found)}")
    if name not in found:
        raise ConfigError(unknown(group, name, found))
    if options.format == "json":
        sys.stdout.write(f"{json.dumps(asdict(found[name]), indent=2, ensure_ascii=False)}\n")
        return
    others = [other for other in found if other != name]
    sys.stdout.writelines(f"{line}\n" for line in _lines(group, found[name], others))


def _lines(group: str, choice: Choice, others: list[str]) -> Iterator[str]:
    summary = f": {choice.summary}" if choice.summary else ""
    yield from textwrap.wrap(f"{group}={choice.name}{summary}", _WIDTH)
    for title, text in choice.facts.items():
        yield from textwrap.wrap(f"{title}: {text}", _WIDTH, initial_indent="  ", subsequent_indent="    ")
    from fellrec.config.describe import PRESETS

    for setting in choice.settings:
        default = "needed" if setting.default == "???" else json.dumps(setting.default, ensure_ascii=False)
        yield ""
        yield setting.key
        about = {"default": default, "allowed": setting.allowed or "any value", "": setting.text}
        if group == PRESETS:
            about = {"value": default, "": setting.text}
        for title, text in about.items():
            start = f"  {title + ':':<9}" if title else "  "
            yield from textwrap.wrap(text, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
    if not choice.settings:
        yield "  it has no settings of its own"
    if others:
        yield ""
        yield from textwrap.wrap(f"other choices: {', '.join(others)}", _WIDTH, subsequent_indent="  ")
