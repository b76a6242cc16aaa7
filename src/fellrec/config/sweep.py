"""Sweeps: from comma-separated values to the overrides of each run.

Each aggregation rule has its own settings. Where several rules are named together, an override such as
``aggregation.alpha=0.3,0.7`` is for those that have the setting; the others are run without it, and so once:
``aggregation=fedavg,fellrec aggregation.alpha=0.3,0.7`` is three runs.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence

from hydra.core.override_parser.types import Override

from fellrec.config.compose import composed
from fellrec.config.instantiate import import_target, setting_names
from fellrec.config.overrides import parse
from fellrec.config.own_rules import split_rules
from fellrec.config.secrets import URI
from fellrec.errors import ConfigError, unknown
from fellrec.functional.quoting import hydra_value
from fellrec.functional.secrets import VARIABLE, has_secret, hide

_GROUP = "aggregation"
_RULE = (_GROUP, f"{_GROUP}._target_")
"""Overrides that name the rule."""
_MOST_RUNS = 10_000
"""Runs of a sweep; more are a mistake."""
_INTERPOLATION = re.compile(r"\$\{[^}]*\}")
"""A variable of the environment, say, that is read when the settings are used."""


def expand(overrides: Sequence[str], runs: Sequence[Sequence[str]] = ()) -> list[list[str]]:
    """Expand comma-separated values into one list of overrides per run, the last key varying fastest.

    Args:
        overrides: Of all runs.
        runs: Further overrides; each list is combined with ``overrides``, the lists not with each other.

    Raises:
        ConfigError: For a malformed override, or a setting that no rule of the sweep has.
    """
    return [run for sweep in sweeps(overrides, runs) for run in _product(sweep)]


def sweeps(overrides: Sequence[str], runs: Sequence[Sequence[str]] = ()) -> list[list[str]]:
    """The sweeps, values still separated by commas, in which every rule has all settings that are given for it.

    Args:
        overrides: Of all runs; settings of rules in it are left out for rules that do not have them.
        runs: See `expand`.

    Raises:
        ConfigError: As `expand`.
    """
    overrides = _readable(overrides)
    given = [[*overrides, *_readable(run)] for run in runs] or [overrides]
    given = [part for sweep in given for part in split_rules(sweep)]
    shared = {text: name for item in parse(overrides) if (text := str(item.input_line)) and (name := _setting(item))}
    of_one_rule = [part for sweep in given for part in _product(sweep, only=_RULE)] if shared else []
    if len(of_one_rule) < 2:
        return given
    names = [_settings_of_rule(part) for part in of_one_rule]
    for name in shared.values():
        if not any(name in known for known in names):
            choices = dict.fromkeys(f"{_GROUP}.{choice}" for known in names for choice in known)
            raise ConfigError(unknown("setting", f"{_GROUP}.{name}", choices))
    if all(name in known for name in shared.values() for known in names):
        return given
    return [
        [text for text in part if text not in shared or shared[text] in known]
        for part, known in zip(of_one_rule, names, strict=True)
    ]


def _readable(overrides: Sequence[str]) -> list[str]:
    return [str(item.input_line) for item in parse(overrides)]


def _setting(item: Override) -> str | None:
    """The setting of a rule that an override gives a value; ``None`` for any other override."""
    group, _, name = item.key_or_group.partition(".")
    return name if group == _GROUP and name not in ("", "_target_") and not item.is_delete() else None


def _settings_of_rule(overrides: Sequence[str]) -> list[str]:
    """Names of the settings of the rule that some overrides name."""
    naming = [text for text in overrides if parse([text])[0].key_or_group in (*_RULE, "hydra.searchpath")]
    node = composed(naming)[_GROUP]
    if any(text.startswith(f"{_GROUP}._target_=") for text in naming):  # a class that conf/ may not know
        return setting_names(import_target(node["_target_"], _GROUP))
    return [str(name) for name in node if name != "_target_"]


def _product(overrides: Sequence[str], only: Sequence[str] = ()) -> list[list[str]]:
    """Every combination of the values of all keys, or of those in ``only``."""
    axes = [
        _values(item)
        if item.is_sweep_override() and (not only or item.key_or_group in only)
        else [str(item.input_line)]
        for item in parse(overrides)
    ]
    if (count := math.prod(map(len, axes))) > _MOST_RUNS:
        raise ConfigError(f"the sweep has {count:,} runs; at most {_MOST_RUNS:,} are allowed")
    return [list(combination) for combination in itertools.product(*axes)]


def _values(item: Override) -> list[str]:
    """The overrides of a sweep's one setting.

    Raises:
        ConfigError: If there are none, or too many.
    """
    found = list(itertools.islice(item.sweep_string_iterator(), _MOST_RUNS + 1))
    if not found:
        raise ConfigError(f"{item.input_line} gives no value, so the sweep has no run")
    if len(found) > _MOST_RUNS:
        raise ConfigError(f"{item.input_line} gives more than {_MOST_RUNS:,} values, which is the limit of a sweep")
    return [f"{item.get_key_element()}={value}" for value in found]


def without_passwords(overrides: Sequence[str]) -> list[str]:
    """The overrides as they may be written: a password of ``tracking.uri`` stays in memory.

    Raises:
        ConfigError: If another one has a password.
    """
    shown = []
    for item in parse(overrides):
        text, value = str(item.input_line), item.value()
        if item.key_or_group == URI and isinstance(value, str) and "${" not in value and hide(value) != value:
            text = f"{item.get_key_element()}={hydra_value(hide(value))}"
        if has_secret(_INTERPOLATION.sub("", text)):
            raise ConfigError(f"{item.key_or_group} has a password, and overrides are written: set {VARIABLE} instead")
        shown.append(text)
    return shown
