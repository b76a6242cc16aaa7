"""Paths of the configuration and of the cache, and the choices, without heavy imports, for ``--help``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from omegaconf import DictConfig


def conf_dir() -> Path:
    """The folder of the Hydra groups: inside an installed wheel, or ``conf/`` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed, checkout = package / "conf", package.parents[1] / "conf"
    return installed if installed.is_dir() else checkout


def cache_dir(config: DictConfig) -> Path:
    """The folder of prepared data, pretrained tiny backbones and converted models."""
    return Path(config.cache_dir or "~/.cache/fellrec").expanduser()


@cache
def group_choices() -> Mapping[str, Sequence[str]]:
    """The configuration groups and their choices, by name; the ``for_…`` defaults are left out. Read once."""
    root = conf_dir()
    groups: dict[str, list[str]] = {}
    for path in sorted(root.rglob("*.yaml")):
        if path.parent != root and not path.stem.startswith(("for_", "_")):
            groups.setdefault(path.parent.relative_to(root).as_posix(), []).append(path.stem)
    return groups
