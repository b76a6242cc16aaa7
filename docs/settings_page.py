"""The reference of all settings, from the descriptions of ``fellrec show``; ``conf.py`` puts it into the site."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from fellrec.config.describe import PRESETS, Choice, Setting, choices, default_choice, settings_of
from fellrec.config.paths import group_choices
from fellrec.config.registry import GROUPS


def reference() -> str:
    """The page's text after its introduction, as Markdown: a section for each group, a table for each choice."""
    lines = ["## Run", "", *_table(settings_of(GROUPS[""], ""))]
    for group in group_choices():
        lines += ["", f"## {group}", "", *_group(group)]
    return "\n".join(lines) + "\n"


def _group(group: str) -> Iterator[str]:
    found = choices(group)
    default = default_choice(group)
    if group == PRESETS:
        yield "Presets choose and set values of other groups; settings on the command line override them."
    elif default:
        yield f"Default: `{group}={default}`."
    else:
        yield "The default depends on another group."
    shared = [setting for setting in found[0].settings if all(setting in choice.settings for choice in found)]
    if len(found) > 1 and shared:
        yield from ("", f"Settings of every choice of `{group}`:", "", *_table(shared))
    for choice in found:
        own = [setting for setting in choice.settings if len(found) == 1 or setting not in shared]
        yield from _choice(group, choice, own)


def _choice(group: str, choice: Choice, own: Sequence[Setting]) -> Iterator[str]:
    yield from ("", f"### {group}={choice.name}", "")
    if choice.summary:
        yield from (_cell(choice.summary), "")
    for title, text in choice.facts.items():
        yield f"- {title}: {_cell(text)}"
    if choice.facts:
        yield ""
    if own:
        yield from _table(own, "value" if group == PRESETS else "default")


def _table(settings: Sequence[Setting], second: str = "default") -> Iterator[str]:
    yield f"| setting | {second} | allowed | description |"
    yield "|---|---|---|---|"
    for setting in settings:
        default = "needed" if setting.default == "???" else f"`{json.dumps(setting.default, ensure_ascii=False)}`"
        yield f"| `{setting.key}` | {_cell(default)} | {_cell(setting.allowed)} | {_cell(setting.text)} |"


def _cell(text: str) -> str:
    """Text that neither ends a cell of a table nor is read as HTML."""
    return text.replace("|", "\\|").replace("<", "&lt;")
