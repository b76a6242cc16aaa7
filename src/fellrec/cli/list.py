"""``fellrec list``: the choices of a configuration group, with their settings; metrics."""

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

PURPOSE = "list rules, data, presets, backbones, metrics, attacks, or the choices of any configuration group"
EXAMPLES = (
    "fellrec list",
    "fellrec list rules",
    "fellrec list presets",
    "fellrec list metrics",
    "fellrec list attacks",
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
METRICS, ATTACKS = "metrics", "attacks"
"""What is listed beside the groups."""
METRIC_TEXTS = {
    "ndcg": "normalised discounted cumulative gain: a target counts 1 / log2(rank + 1)",
    "recall": "fraction of a user's targets among the first K",
    "hr": "hit rate: whether one of the targets is among the first K",
    "mrr": "1 / rank of the first target, 0 beyond K",
}
FIGURE_TEXTS = {
    "mean": "mean over clients: each client counts once",
    "pooled": "mean over users: each user counts once",
    "std": "standard deviation over clients, lower is better",
    "variance": "its square",
    "coefficient_of_variation": "CV: std / mean, lower is better",
    "worst": "of the worst client",
    "worst_10_percent": "mean over the worst tenth of the clients",
    "gap": "best minus worst client, lower is better",
    "gini": "Gini coefficient, 0 if all clients are equal",
    "jain": "Jain's index, 1 if all clients are equal",
    "entropy": "entropy of the clients' fractions of the sum, 1 if all are equal",
}
_UNBROKEN = "\N{NO-BREAK SPACE}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "group",
        nargs="?",
        metavar="GROUP",
        help="such as rules, metrics, attacks, or GROUP=NAME; default: all groups",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these choices, with all that is known of them")
    parser.add_argument(
        "--all", action="store_true", help="all that is known of every choice, also of a group with many, aggregation"
    )
    add_format(parser)


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    from fellrec.config.describe import choices, group_named
    from fellrec.config.paths import group_choices
    from fellrec.errors import ConfigError, unknown

    if options.group is None:
        groups = group_choices()
        if options.format == "json":
            sys.stdout.write(f"{json.dumps(groups, indent=2)}\n")
        else:
            sys.stdout.writelines(f"{group:<14} {', '.join(names)}\n" for group, names in groups.items())
            sys.stdout.write("\nfellrec list GROUP describes each choice, fellrec show GROUP every setting; so does\n")
            sys.stdout.write("fellrec list rules (aggregation), presets (experiment), metrics, attacks\n")
        return
    if options.group == METRICS:
        _list_metrics(options.format)
        return
    if options.group == ATTACKS:
        _list_attacks(options.format)
        return
    group, _, given = options.group.partition("=")
    group = group_named(group)
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


def _list_metrics(output_format: str) -> None:
    """Every metric and every figure of it that tables, results.json and MLflow have."""
    if output_format == "json":
        found = {"metrics": METRIC_TEXTS, "figures": FIGURE_TEXTS}
        sys.stdout.write(f"{json.dumps(found, indent=2, ensure_ascii=False)}\n")
        return
    sys.stdout.write("metrics, at each cutoff K of trainer.cutoffs; higher is better\n")
    sys.stdout.writelines(f"  {name + '_at_K':<28} {text}\n" for name, text in METRIC_TEXTS.items())
    sys.stdout.write("\nfigures of each metric, such as ndcg_at_10/worst\n")
    sys.stdout.writelines(f"  {name:<28} {text}\n" for name, text in FIGURE_TEXTS.items())


def _list_attacks(output_format: str) -> None:
    """Every attack of fellrec attack, the baselines, and the settings."""
    from fellrec.attacks import ATTACKS as known
    from fellrec.attacks import BASELINES
    from fellrec.attacks.settings import AttackSettings
    from fellrec.config.describe import settings_of

    own = settings_of(AttackSettings, "attack")
    if output_format == "json":
        shown = {"attacks": known, "baselines": BASELINES, "settings": [asdict(setting) for setting in own]}
        sys.stdout.write(f"{json.dumps(shown, indent=2, ensure_ascii=False)}\n")
        return
    for title, texts in {"attacks of fellrec attack RUN_DIR": known, "reported beside them": BASELINES}.items():
        sys.stdout.write(f"{title}\n")
        sys.stdout.writelines(f"  {name:<20} {text}\n" for name, text in texts.items())
        sys.stdout.write("\n")
    sys.stdout.write("settings\n")
    sys.stdout.writelines(f"  {_line(setting)}\n" for setting in own)


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
