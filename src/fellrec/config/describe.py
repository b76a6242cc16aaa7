"""What a user can choose and set, in words: from the dataclasses of settings, without PyTorch."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any

import yaml

from fellrec.config.paths import conf_dir, group_choices
from fellrec.config.registry import CHOICES, GROUPS, OF_CHOICE, known_by, plain_default
from fellrec.errors import ConfigError, unknown
from fellrec.functional.nested import flatten
from fellrec.functional.ranges import ranges


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        key: Such as ``aggregation.mu``.
        default: As a plain value, that of the choice if it has its own; ``"???"`` if it must be given.
        allowed: Its range in words; empty if it is not known.
        text: What it means.
    """

    key: str
    default: Any
    allowed: str
    text: str


@dataclass(frozen=True)
class Choice:
    """One choice of a group, such as ``aggregation=fedprox``.

    Attributes:
        name: Its name.
        summary: What it is, in one line; empty if nothing is known.
        facts: Other things that are known of it, by title.
        settings: What can be set.
    """

    name: str
    summary: str
    facts: Mapping[str, str]
    settings: tuple[Setting, ...]


def settings_of(kind: type, group: str) -> tuple[Setting, ...]:
    """The settings of a dataclass, and of those in it.

    Args:
        kind: The dataclass.
        group: Where its fields are in a configuration.
    """
    known = ranges(kind)
    texts = {name: text for base in reversed(kind.__mro__[:-1]) for name, text in _descriptions(base).items()}
    found: list[Setting] = []
    for field in fields(kind):
        key = f"{group}.{field.name}" if group else field.name
        if is_dataclass(field.default_factory) and isinstance(field.default_factory, type):
            found += settings_of(field.default_factory, key)
            continue
        default = plain_default(field.default, field.default_factory)
        allowed = known[field.name].text if field.name in known else ""
        found.append(Setting(key, default, allowed, texts.get(field.name, "")))
    return tuple(found)


def choices(group: str) -> list[Choice]:
    """The choices of a group, by name.

    Args:
        group: Such as ``aggregation``.

    Raises:
        ConfigError: If there is no such group.
    """
    names = group_choices()
    if group not in names:
        raise ConfigError(unknown("group", group, names))
    return [_choice(group, name) for name in names[group]]


def _choice(group: str, name: str) -> Choice:
    kinds = {key: kind for key in CHOICES if key.partition(".")[0] == group for kind in _kinds_in(group, name, key)}
    settings = [setting for key, kind in kinds.items() for setting in settings_of(kind, key)]
    if group in GROUPS:
        settings += list(settings_of(OF_CHOICE.get((group, name), GROUPS[group]), group))
    own = _own_values(group, name)
    elsewhere = tuple(f"{key}." for key in own)  # such as data.reader.columns, which are data.columns
    settings = [
        replace(setting, default=own.get(setting.key, setting.default))
        for setting in settings
        if not setting.key.startswith(elsewhere)
    ]
    about = next((kind.about for kind in kinds.values() if hasattr(kind, "about")), None)
    if group == PRESETS:
        return Choice(name, _comment(group, name), {}, tuple(_set_by(name)))
    if about is None:
        kinds |= {group: OF_CHOICE[group, name]} if (group, name) in OF_CHOICE else {}
        lines = [(inspect.getdoc(kind) or "").split("\n")[0] for kind in kinds.values()]
        described = "" if "data.reader" in kinds else " ".join(lines)  # a reader is that of several data sets
        return Choice(name, described or _comment(group, name), {}, tuple(settings))
    facts = {
        "in tables": about.title,
        "family": about.family,
        "paper": about.paper,
        "sees": about.sees,
        "extra cost": about.cost,
    }
    if about.is_exact:
        facts["exact"] = "the clients' mean change of weights"
    if not about.limits.one_rank:
        facts["ranks"] = "may differ between clients"
    if limits := about.limits.texts():
        facts["not with"] = "; ".join(limits)
    return Choice(name, about.summary, facts, tuple(settings))


def _set_by(preset: str) -> Iterator[Setting]:
    """What a preset chooses and sets."""
    for key, value in _own_values(PRESETS, preset).items():
        if key == f"{PRESETS}.defaults":
            for item in value:
                yield from (Setting(k.removeprefix("override /"), v, "", "chosen by it") for k, v in item.items())
        else:
            yield Setting(key.removeprefix(f"{PRESETS}."), value, "", "set by it")


def _comment(group: str, name: str) -> str:
    """The first comment of the file of a choice that is for people; empty without one."""
    for line in (conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ")
    return ""


def _own_values(group: str, name: str) -> dict[str, Any]:
    """What the file of a choice sets, by key."""
    node = yaml.safe_load((conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8"))
    return flatten({group: node or {}})


PRESETS = "experiment"
"""The group whose choices set values of other groups."""
ALIASES: Mapping[str, str] = {"rules": "aggregation", "presets": PRESETS}
"""Other names of groups; so is the plural of each."""


def group_named(name: str) -> str:
    """The group that a name stands for: its own, its plural, or an alias; the name itself if there is none.

    Example:
        >>> group_named("rules"), group_named("backbones"), group_named("trainer"), group_named("x")
        ('aggregation', 'backbone', 'trainer', 'x')
    """
    singular = name.removesuffix("s")
    return ALIASES.get(name, name if name in group_choices() or singular not in group_choices() else singular)


def default_choice(group: str) -> str | None:
    """The choice of a group that a run without overrides has; ``None`` if it has none, or another group decides."""
    config = yaml.safe_load((conf_dir() / "config.yaml").read_text(encoding="utf-8"))
    found = {key: value for item in config["defaults"] if isinstance(item, dict) for key, value in item.items()}
    value = str(found.get(group))
    return value if value in group_choices()[group] else None


def _kinds_in(group: str, name: str, key: str) -> list[type]:
    """The dataclass that the file of a choice names, if it is one of ``CHOICES[key]``."""
    if known_by(key) == "name":
        kind = CHOICES[key].get(_own_values(group, name).get(f"{key}.name", name))
        return [] if kind is None else [kind]
    text = (conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8").split()
    named = [kind for kind in CHOICES[key].values() if kind.__name__ in text]
    return named or [kind for value, kind in CHOICES[key].items() if value in text]


@cache
def _descriptions(kind: type) -> dict[str, str]:
    """The docstrings under the fields of a class, as one line each."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found, field = {}, None
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            field = node.target.id
        elif field and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found[field], field = " ".join(str(node.value.value).replace("``", "`").split()), None
        else:
            field = None
    return found
