"""Rules of the user's own beside those of the package: ``aggregation=fedavg,my_rules.Median``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

_OVERRIDE = re.compile(r"aggregation=(?P<names>[^\s()\[\]{}'\"]*)")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


def with_target(overrides: Sequence[str]) -> list[str]:
    """Overrides in which a class is named by ``_target_``.

    Example:
        >>> with_target(["aggregation=my_rules.Median", "seed=1"])
        ['aggregation._target_=my_rules.Median', 'seed=1']
    """
    return [_named(item) for item in overrides]


def split_rules(overrides: Sequence[str]) -> list[list[str]]:
    """The same sweep as several ones, in each of which all rules are choices of the package, or one is a class.

    Example:
        >>> split_rules(["aggregation=fedavg,local,my_rules.Median", "seed=0,1"])
        [['aggregation=fedavg,local', 'seed=0,1'], ['aggregation._target_=my_rules.Median', 'seed=0,1']]
    """
    for place, item in enumerate(overrides):
        found = _OVERRIDE.fullmatch(item)
        if found and any(map(_is_class, names := found["names"].split(","))):
            groups = [(is_own, list(of_kind)) for is_own, of_kind in groupby(names, _is_class)]
            rules = [rule for is_own, of_kind in groups for rule in (of_kind if is_own else [",".join(of_kind)])]
            return [[*overrides[:place], _named(f"aggregation={rule}"), *overrides[place + 1 :]] for rule in rules]
    return [list(overrides)]


def _is_class(name: str) -> bool:
    return _DOTTED.fullmatch(name) is not None


def _named(item: str) -> str:
    key, _, value = item.partition("=")
    return f"{key}._target_={value}" if key == "aggregation" and _is_class(value) else item
