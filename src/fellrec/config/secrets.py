"""Keeps passwords out of what a run writes: its settings and its batch script."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from fellrec.functional.secrets import VARIABLE, has_secret, hide, known_secrets, names_secret
from fellrec.tracking.settings import TrackingSettings
from fellrec.tracking.store import absolute

URI = "tracking.uri"
_VARIABLES = {"uri": VARIABLE, "experiment": "MLFLOW_EXPERIMENT_NAME"}
_ASSIGNMENT = re.compile(r"(?<![\w$])([A-Za-z_]\w*)=(?![\s$\"']*\$|\s|$)")
"""A variable that gets a value in a line of bash or an option, other than that of another variable."""


def settle_tracking(config: DictConfig, given: Collection[str]) -> None:
    """Take the tracking store from the environment if no setting names one, and keep its password in memory only.

    Args:
        config: Composed; ``tracking.uri`` becomes an absolute path or an address without its password.
        given: Keys of the overrides.
    """
    tracking = config.tracking
    for name, variable in _VARIABLES.items():
        default = getattr(TrackingSettings, name)
        if f"tracking.{name}" not in given and tracking.get(name) == default:
            tracking[name] = os.environ.get(variable) or default
    if isinstance(tracking.get("uri"), str):
        tracking.uri = hide(absolute(tracking.uri))


def secret_settings(config: Mapping[str, Any]) -> Iterator[str]:
    """Which settings have a secret that the run directory or the batch script would show, one message each."""
    known = known_secrets()
    for key, value in _leaves(config):
        name = key.rpartition(".")[2]
        assigned = _ASSIGNMENT.findall(str(value)) if key.startswith("launcher.") else []
        if variable := next(filter(names_secret, assigned), None):
            yield (
                f"{key} sets {variable}, which would be written into the batch script: export {variable}, and fellrec "
                "submit passes it on"
            )
        elif names_secret(name) and key.startswith("launcher.environment."):
            yield f"{key} would be written into the batch script: export {name}, and fellrec submit passes it on"
        elif (names_secret(name) and value is not None) or (key != URI and has_secret(str(value), known)):
            yield f"{key} has a secret, and settings are written into the run directory: read it from the environment"


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values of mappings and lists, with the dotted key; what is in a list has the key of the list."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part, key)
    else:
        yield key, value
