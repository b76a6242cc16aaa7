"""The configuration in a run directory, which may come from someone else: data to be checked, never a program.

It is read without interpolation, and may name classes of fellrec only; others must be named on the command line.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fellrec.config.compose import check
from fellrec.config.instantiate import is_own, targets
from fellrec.config.members import alone
from fellrec.config.registry import NEWER, RENAMED, defaults_of, parts, wrong_groups
from fellrec.data.files import PLACES as OF_DATA
from fellrec.errors import ConfigError
from fellrec.functional.nested import flatten
from fellrec.state.cache import has_entries
from fellrec.state.inside import check_inside
from fellrec.state.run_folder import CONFIG, which_run

log = logging.getLogger(__name__)

_FORMAT = 1
"""Format of ``config.yaml`` in a run directory; increased when older files can no longer be read."""
PLACES = (*(f"data.{name}" for name in OF_DATA), "backbone.path", "cache_dir", "participation.sampler.path")
"""Settings that say where something is; what is there must be what the run was started with."""
_UNREADABLE = (OSError, ValueError, TypeError, AttributeError, RecursionError, yaml.YAMLError, OmegaConfBaseException)
"""What reading a damaged file raises."""
_MOST_BYTES, _MOST_DEPTH = 1 << 18, 16
"""A configuration has some kilobytes, and lists in mappings in mappings."""


def to_yaml(config: DictConfig) -> str:
    """The text of a run's ``config.yaml``, for `read_config`."""
    return f"format: {_FORMAT}\n{OmegaConf.to_yaml(config, resolve=True)}"


def read_config(run_dir: Path, trusted: Collection[str] = ()) -> DictConfig:
    """The configuration that a run was started with, checked; settings that are newer than the run have their defaults.

    Args:
        run_dir: The run's directory.
        trusted: Dotted names of classes that are not of fellrec and may be used.

    Raises:
        ConfigError: If the directory is not a run's or has links that leave it, if the file was written by a version
            with other settings or is damaged, or if it names another class.

    A cache folder that is none is replaced by the user's own, with a warning: entries would be written there.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise ConfigError(f"{run_dir} has no {CONFIG}; {which_run(run_dir)}")
    check_inside(run_dir)
    config = _load(path)
    found = config.pop("format", None)
    if found != _FORMAT:
        raise ConfigError(
            f"{path} has format {found or 0}, this version of fellrec reads format {_FORMAT}: the run was made by "
            "another version and cannot be resumed or evaluated by this one; its results and adapters stay readable"
        )
    _add_newer_groups(config)
    plain: Any = OmegaConf.to_container(config)
    _check_shape(plain, path)
    _check_trust(plain, trusted, path)
    _use_own_cache(config, path)
    add_newer(config)
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return config


def read_settings(run_dir: Path) -> dict[str, Any]:
    """The settings that a run was started with, flat, as they are in the file: to be shown, not to make objects of.

    Raises:
        ConfigError: If the directory is not a run's or has links that leave it, or if the file is damaged.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        raise ConfigError(f"{run_dir} has no {CONFIG}; {which_run(run_dir)}")
    check_inside(run_dir)
    plain: Any = OmegaConf.to_container(_load(path))
    plain.pop("format", None)
    return {str(key): value for key, value in flatten(plain).items()}


def moved(config: DictConfig, overrides: Sequence[str], allowed: Sequence[str] = PLACES) -> DictConfig:
    """The configuration of a run with other values of the settings that do not change its result.

    Args:
        config: Of `read_config`.
        overrides: ``KEY=VALUE``; the value of a path is everything after the equals sign.
        allowed: The keys.

    Raises:
        ConfigError: For another key, or a value that is not allowed.
    """
    for item in overrides:
        key, _, value = item.partition("=")
        if alone(key) not in allowed or not value or OmegaConf.select(config, key, default=None) is None:
            raise ConfigError(
                f"{item!r} is not allowed: a run keeps its own configuration; leave out {item}. Only "
                f"{', '.join(allowed)} can be changed, where it has them"
            )
    new = config.copy()
    for key, _, value in (item.partition("=") for item in overrides):
        if alone(key) not in PLACES:
            new.merge_with_dotlist([f"{key}={value}"])
            continue
        old, here = OmegaConf.select(config, key), str(Path(value).expanduser().resolve())
        OmegaConf.update(new, key, here)
        if alone(key).startswith("data."):
            reader = f"{key.rpartition('.')[0]}.reader"
            for name in [name for name, own in OmegaConf.select(config, reader).items() if own == old]:
                OmegaConf.update(new, f"{reader}.{name}", here)
    check(new)
    return new


def own_classes(config: DictConfig) -> list[str]:
    """The classes of a configuration that are not of fellrec: what ``--trust`` has to name when the run is read."""
    return list(dict.fromkeys(name for name in targets(OmegaConf.to_container(config)) if not is_own(name)))


def _load(path: Path) -> DictConfig:
    """Read the file in bounded time and memory, and refuse everything that is not a plain value."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"{path} is not the configuration of a run: it has more than {_MOST_BYTES:,} bytes")
        text = content.decode()
        if "${" in text:
            raise ConfigError(f"{path} has an interpolation, ${{…}}; runs write none into their configuration")
        _check_events(text, path)
        config = OmegaConf.create(text)
        if not isinstance(config, DictConfig):
            raise ConfigError(f"{path} is not the configuration of a run: it has no settings")
        _rename(config)
    except _UNREADABLE as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    return config


def _rename(config: DictConfig) -> None:
    """Give settings the names and values that they have now, also those of the members of a federation."""
    for old, (new, values) in RENAMED.items():
        group, _, name = old.rpartition(".")
        node = OmegaConf.select(config, group)
        members: Any = node.get("member") if OmegaConf.is_dict(node) else None
        for own in (node, *(members.values() if OmegaConf.is_dict(members) else ())):
            if OmegaConf.is_dict(own) and name in own:
                value = own.pop(name)
                own[new.rpartition(".")[2]] = values.get(value, value)


def _check_events(text: str, path: Path) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if depth == 0 and isinstance(event, (yaml.ScalarEvent, yaml.SequenceStartEvent)):
            raise ConfigError(f"{path} is not the configuration of a run: it has no settings")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > _MOST_DEPTH:
            raise ConfigError(f"{path} is not the configuration of a run: it has aliases, or too many levels")


def add_newer(config: DictConfig) -> None:
    """Add groups and settings that a stored configuration does not have, with their defaults: they are newer."""
    _add_newer_groups(config)
    plain: Any = OmegaConf.to_container(config)
    for part in parts(plain):
        for name, default in defaults_of(part.kind).items():
            if name not in part.values and default != "???":
                OmegaConf.update(config, part.dotted(name), default)


def _add_newer_groups(config: DictConfig) -> None:
    """Add groups that did not exist when the run was made, as it was then."""
    for key, node in NEWER.items():
        group, _, name = key.partition(".")
        if group in config and name and OmegaConf.is_dict(config[group]) and name not in config[group]:
            config[group][name] = dict(node)
        elif group not in config and not name:
            config[group] = dict(node)


def _check_shape(plain: Mapping[str, Any], path: Path) -> None:
    """Raise if a group is missing or is not a mapping."""
    if wrong := wrong_groups(plain):
        raise ConfigError(f"{path} is not the configuration of a run: {wrong[0]}")
    if strange := [key for key in flatten(plain) if not all(key.split("."))]:
        raise ConfigError(f"{path} is not the configuration of a run: it has the key {strange[0]!r}")


def _use_own_cache(config: DictConfig, path: Path) -> None:
    """Replace a folder that has no entries of a cache; a run from someone else may name any."""
    given = config.get("cache_dir")
    if not isinstance(given, str) or has_entries(Path(given).expanduser()):
        return
    own = os.environ.get("FELLREC_CACHE") or "~/.cache/fellrec"
    if Path(given).expanduser() != Path(own).expanduser():
        log.warning("%s names cache_dir=%s, which has no entries of a cache; %s is used", path, given, own)
        config.cache_dir = own


def _check_trust(plain: Mapping[str, Any], trusted: Collection[str], path: Path) -> None:
    strange = dict.fromkeys(name for name in targets(plain) if not is_own(name) and name not in trusted)
    if strange:
        options = " ".join(f"--trust {name}" for name in strange)
        raise ConfigError(
            f"{path} names {', '.join(strange)}, not of fellrec, whose code would run. If you know and trust it, add "
            f"{options} to the command"
        )
