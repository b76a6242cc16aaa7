"""Configuration: how overrides are composed, what is checked before anything starts."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from fellrec.config.describe import choices
from fellrec.config.instantiate import as_dict, settings
from fellrec.config.members import (
    about_member,
    add_members,
    data_nodes,
    federation_problems,
    is_federation,
    split_overrides,
)
from fellrec.config.overrides import parse
from fellrec.config.own_rules import with_target
from fellrec.config.paths import conf_dir, group_choices
from fellrec.config.registry import (
    CHOICES,
    GROUPS,
    Part,
    defaults_of,
    known_by,
    parts,
    register,
    wrong_groups,
)
from fellrec.config.secrets import secret_settings, settle_tracking
from fellrec.config.transforms import expand_transforms
from fellrec.data.files import PLACES, files_name
from fellrec.errors import ConfigError, nearest_first, unknown
from fellrec.functional.nested import flatten
from fellrec.functional.ranges import out_of_range, refuse
from fellrec.models.packages import missing_packages

_MOST_CHOICES = 6
"""Names of choices that a message has at most."""

_CALLBACKS = "callbacks"
"""A group whose keys are names that a user may choose."""


def compose(overrides: Sequence[str], optional: Collection[str] = ()) -> DictConfig:
    """Compose and check the configuration of one run.

    Args:
        overrides: Hydra overrides such as ``aggregation=fedavg`` or ``trainer.num_rounds=3``.
        optional: Keys that the verb can do without: they may stay without a value.

    Raises:
        ConfigError: For an unknown key or choice (the nearest names come first), a malformed override, or a value
            that is out of range.
    """
    if resuming := [item for item in overrides if item.startswith("resume=") and item != "resume=null"]:
        raise ConfigError(_not_resumed(resuming[-1]))
    overrides = with_target(overrides)
    known, wrong = list(overrides), list[str]()
    try:
        try:
            config = composed(known)
        except ConfigError as error:
            known, wrong = _known(overrides, error)
            config = composed(known)
        if config.resume is not None:
            raise ConfigError(_not_resumed(f"resume={config.resume}"))
        settle_tracking(config, {item.key_or_group for item in parse(known)})
        check(config, optional)
        _check_installed(config)
    except ConfigError as error:
        raise ConfigError("\n".join([*wrong, str(error)])) from error
    if wrong:
        raise ConfigError("\n".join(wrong))
    _make_paths_absolute(config)
    _name_data(config)
    return config


def _known(overrides: Sequence[str], first: ConfigError) -> tuple[list[str], list[str]]:
    """The overrides that can be read and whose settings exist, and a message for each of the others.

    Args:
        overrides: Those of the command.
        first: Why they cannot be composed.

    Raises:
        ConfigError: If it is a choice that cannot be read: which settings exist depends on it.
    """
    known, wrong = [], []
    for text in overrides:
        try:
            parse([text])
            known.append(text)
        except ConfigError as error:
            wrong.append(str(error))
            if text.partition("=")[0].lstrip("+~") in group_choices():
                raise ConfigError("\n".join(wrong)) from error
    reason: ConfigError | None = first if len(known) == len(overrides) else None
    while True:
        try:
            if reason is not None:
                raise reason
            composed(known)
            return known, wrong
        except _UnknownKeyError as error:
            left = [text for text in known if parse([text])[0].key_or_group != error.key]
            wrong.append(str(error))
            if len(left) == len(known):
                raise ConfigError("\n".join(wrong)) from error
            known, reason = left, None
        except ConfigError:
            return known, wrong  # what is wrong is said when they are composed


class _UnknownKeyError(ConfigError):
    """A setting that does not exist; ``key`` is its name."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message)
        self.key = key


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration of one run, unchecked; an overridden ``_target_`` does not get the defaults of another class.

    Raises:
        ConfigError: For an unknown key or choice, or a malformed override.
    """
    own, of_members = split_overrides(overrides)
    config = _hydra(own)
    if of_members and not is_federation(config):
        return _hydra(overrides)  # it says what is wrong
    given = {item.key_or_group for item in parse(own)}
    for key in CHOICES:
        if known_by(key) == "_target_" and f"{key}._target_" in given:
            _drop_defaults(config, key, own, given)
    expand_transforms(config)
    if is_federation(config):
        add_members(config, own, of_members, lambda alone: _of_member(conf_dir(), tuple(alone)))
    return config


@lru_cache(maxsize=64)
def _of_member(conf: Path, overrides: tuple[str, ...]) -> DictConfig:
    """A run on one data set, composed once for all runs of a sweep; not to be changed."""
    return composed(overrides)


def check(config: DictConfig, optional: Collection[str] = ()) -> None:
    """Check every setting whose range is known, and name all that are wrong in one error.

    Args:
        config: The composed configuration.
        optional: Keys that may stay without a value.

    Raises:
        ConfigError: With one line per problem: the key, the value, what is allowed.
    """
    missing = [key for key, value in _flat(config).items() if value == "???"]
    problems = [_needs_value(key) for key in missing if key not in optional]
    known = config.copy()
    for key in missing:
        OmegaConf.update(known, key, None)
    try:
        plain = as_dict(known)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(_explain(error, ())) from error
    if wrong := wrong_groups(plain):
        raise ConfigError("\n".join([*problems, *wrong]))
    for part in parts(plain):
        problems += _problems(part, missing)
    problems += [*_check_backbone(config), *federation_problems(config), *secret_settings(plain)]
    said = {*missing, *(problem.partition("=")[0] for problem in problems)}
    twice = tuple(
        f"{key.removesuffix(name)}reader.{name}=" for key in said for name in PLACES if key.endswith(f".{name}")
    )
    problems = [problem for problem in problems if not problem.startswith(twice)]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def check_limits(configs: Iterable[DictConfig]) -> None:
    """Refuse what a rule says it cannot work with, as far as that is known without its class, and so without PyTorch.

    Raises:
        ConfigError: With one line for each problem of a configuration.
    """
    for config in configs:
        plain = as_dict(config)
        kinds = [part.kind for part in parts(plain) if part.key == "aggregation"]
        abouts = [kind.about for kind in kinds if hasattr(kind, "about")]
        refuse(*(problem for about in abouts for problem in about.limits.problems(about.name, plain)))


def without_launcher(config: DictConfig) -> DictConfig:
    """The configuration without ``launcher``, which does not affect results."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "launcher"])


def _hydra(overrides: Sequence[str]) -> DictConfig:
    """What Hydra composes; a configuration of the same choices is composed once, and values are set in a copy of it."""
    given = parse(_with_default_callbacks(overrides))
    choosing = [item for item in given if item.key_or_group in group_choices()]
    setting = [item for item in given if item.key_or_group not in group_choices()]
    if all(map(_sets_a_value, setting)):
        with suppress(OmegaConfBaseException):  # Hydra says what is wrong
            config = copy.deepcopy(_of_choices(conf_dir(), tuple(str(item.input_line) for item in choosing)))
            for item in setting:
                try:
                    OmegaConf.update(config, item.key_or_group, item.value(), merge=True)
                except (ConfigKeyError, ConfigAttributeError) as error:
                    key = item.key_or_group
                    if error.full_key == key:
                        raise _UnknownKeyError(_unknown_key(key, overrides), key) from error
                    raise
            return config
    return _composed_by_hydra(given, overrides)


def _with_default_callbacks(overrides: Sequence[str]) -> list[str]:
    """``+callbacks=profile`` adds to the default callbacks, which Hydra calls a choice of a list."""
    added = [item.removeprefix("+callbacks=") for item in overrides if item.startswith("+callbacks=")]
    others = [item for item in overrides if not item.startswith("+callbacks=")]
    return [*others, f"callbacks=[default,{','.join(added)}]"] if added else others


def _sets_a_value(item: Override) -> bool:
    """Whether an override only changes the value of an existing setting."""
    is_plain = not (item.is_add() or item.is_force_add() or item.is_delete() or item.is_sweep_override())
    return is_plain and item.package is None and "/" not in item.key_or_group and not item.is_hydra_override()


@lru_cache(maxsize=256)
def _of_choices(conf: Path, choosing: tuple[str, ...]) -> DictConfig:
    """The configuration of some choices with the values of their files; not to be changed.

    Args:
        conf: The folder of the groups.
        choosing: Overrides, each of which makes a choice.
    """
    return _composed_by_hydra(parse(choosing), choosing)


def _composed_by_hydra(given: Sequence[Override], overrides: Sequence[str]) -> DictConfig:
    register()
    around = GlobalHydra.instance().hydra  # of a multirun, or of the program that calls this
    GlobalHydra.instance().clear()
    try:
        with warnings.catch_warnings(), initialize_config_dir(str(conf_dir()), version_base="1.3"):
            warnings.filterwarnings("error", message="provider=hydra.searchpath")  # a folder that is not there
            return hydra_compose("config", overrides=[str(item.input_line) for item in given])
    except (HydraException, OmegaConfBaseException, ValueError, RecursionError, UserWarning) as error:
        text = _explain(error, overrides)
        key = _unknown_key_in(str(error) or str(error.__cause__))
        raise (_UnknownKeyError(text, key) if key else ConfigError(text)) from error
    finally:
        GlobalHydra.instance().hydra = around


def _drop_defaults(config: DictConfig, key: str, overrides: Sequence[str], given: Collection[str]) -> None:
    """Remove the defaults that the node at ``key`` got from the class that ``_target_`` no longer names."""
    target = f"{key}._target_"
    before = OmegaConf.select(_hydra([text for text in overrides if parse([text])[0].key_or_group != target]), key)
    node = OmegaConf.select(config, key)
    kind = CHOICES[key].get(before["_target_"])
    if kind is None or kind is CHOICES[key].get(node["_target_"]):
        return
    values = OmegaConf.to_container(node, resolve=False)
    assert isinstance(values, dict)
    with open_dict(config):
        for name, default in defaults_of(kind).items():
            if f"{key}.{name}" not in given and name in values and values[name] == default:
                del node[name]


def _problems(part: Part, missing: Sequence[str]) -> Iterator[str]:
    """What is wrong with the settings of one dataclass."""
    deleted = [field.name for field in fields(part.kind) if field.name not in part.values and part.key in GROUPS]
    yield from (_needs_value(part.dotted(name)) for name in deleted)
    absent = [name for name in part.values if part.dotted(name) in missing]
    if absent or deleted:  # a dataclass cannot be made without them
        yield from out_of_range(part.kind, {k: v for k, v in part.values.items() if k not in absent}, part.key)
        return
    try:
        settings(part.kind, part.values, part.key)
    except ConfigError as error:
        lines = str(error).splitlines()
        yield from (about_member(part.member, line) for line in lines) if part.member else lines


def _needs_value(key: str) -> str:
    return f"{key} needs a value: give {key}=…"


def _make_paths_absolute(config: DictConfig) -> None:
    """A run directory's configuration must mean the same from any folder."""
    for node in data_nodes(config).values():
        for name in PLACES:
            if OmegaConf.select(node, name) is not None:
                node[name] = str(Path(node[name]).expanduser().resolve())
    for key in ("backbone.path", "backbone.config", "adapter.path", "participation.sampler.path"):
        value = OmegaConf.select(config, key)
        if value and Path(str(value)).expanduser().exists():
            OmegaConf.update(config, key, str(Path(str(value)).expanduser().resolve()))


def _name_data(config: DictConfig) -> None:
    """Call data without a name by their file or folder."""
    if config.data.name is None:
        config.data.name = files_name(as_dict(config.data))


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = str(error) or str(error.__cause__)
    missing = re.search(r"Could not (?:find|load) '([\w./-]+)/([^'/]*)'", text)
    if missing:
        group, choice = missing.groups()
        if group not in group_choices():
            return f"{group}={choice} is not there: it may need another package, or a folder in hydra.searchpath"
        return unknown(group, choice, group_choices()[group])
    bad_key = _unknown_key_in(text)
    return _unknown_key(bad_key, overrides) if bad_key else _explain_value(text, _where(error))


def _unknown_key_in(text: str) -> str | None:
    """The key in a message of Hydra about a setting that does not exist."""
    found = re.search(
        r"Could not override '([^']+)'|Key '([^']+)' is not in struct|from config. '([^']+)' does not exist", text
    )
    return next(filter(None, found.groups())) if found else None


def _explain_value(text: str, where: str) -> str:
    no_value = re.search(r"Missing mandatory value: ([\w.]+)", text)
    if no_value:
        return _needs_value(no_value.group(1))
    several = re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^']+)'", text)
    if several:
        return f"{several.group(1)} gives several values: only compare, plan, train -m and submit -m take them"
    unset = re.search(r"Environment variable '([^']*)' not found", text)
    if unset:
        return f"the environment variable {unset.group(1)} is not set, which the value of{where} names"
    return f"cannot compose{where}: {' '.join(text.splitlines()[0].split())}"


def _where(error: Exception) -> str:
    """The key that an error of OmegaConf is about, with a space before it."""
    key = getattr(error, "full_key", None)
    return f" {key}" if key else ""


def _not_resumed(text: str) -> str:
    return f"{text} is not allowed here: a run is resumed by fellrec train {text} or fellrec submit {text}"


def _unknown_key(key: str, overrides: Sequence[str]) -> str:
    """Phrase the message for a setting that the choices of ``overrides`` do not have."""
    given = parse(overrides)
    chosen = [str(item.input_line) for item in given if _chooses(item.key_or_group) and item.key_or_group != key]
    config = composed(chosen if len(chosen) < len(given) else ())
    names = [*_flat(config), *sorted(group_choices())]
    group, _, rest = key.partition(".")
    is_own = any(item.key_or_group == f"{group}._target_" for item in given)
    can_be_new = is_own or group == _CALLBACKS
    hint = f"; if it is new, put + before it: +{key}=…" if can_be_new and not _is_deleted(key, given) else ""
    if group == _CALLBACKS and (name := rest.partition(".")[0]) not in config[_CALLBACKS]:
        return unknown("callback", name, map(str, config[_CALLBACKS])) + hint
    parent = key.rpartition(".")[0]
    siblings = [name for name in names if parent and name.startswith(f"{parent}.")]
    return unknown("setting", key, siblings or nearest_first(key, names)[:8]) + hint + _choices_with(key)


def _choices_with(key: str) -> str:
    """Which choices of its group have a setting that the chosen one does not have, as the end of a message."""
    group = key.partition(".")[0]
    if group not in group_choices():
        return ""
    having = [choice.name for choice in choices(group) if any(setting.key == key for setting in choice.settings)]
    more = f" and {len(having) - _MOST_CHOICES} others" if len(having) > _MOST_CHOICES else ""
    return f"; {group}={', '.join(having[:_MOST_CHOICES])}{more} {_has(having)} it" if having else ""


def _has(names: Collection[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _is_deleted(key: str, given: Sequence[Override]) -> bool:
    return any(item.key_or_group == key and item.is_delete() for item in given)


def _chooses(key: str) -> bool:
    """Whether an override decides which settings there are."""
    return key in group_choices() or key == "hydra.searchpath" or key.endswith("._target_")


def _flat(config: DictConfig) -> dict[str, object]:
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return flatten(plain)


def _check_installed(config: DictConfig) -> None:
    """Check that the packages which a backbone's file needs are installed, unless the run is not of this environment.

    Raises:
        ConfigError: Saying how to install them.
    """
    is_elsewhere = config.launcher.container is not None or config.launcher.python is not None
    missing = OmegaConf.is_missing(config.backbone, "path") or is_elsewhere
    path = None if missing else OmegaConf.select(config, "backbone.path")
    if path is not None and (message := missing_packages(str(path))) is not None:
        raise ConfigError(message)


def _check_backbone(config: DictConfig) -> list[str]:
    name, names = config.backbone.get("name"), CHOICES["backbone"]
    return [] if name in names else [unknown("backbone.name", name, names)]
