"""From a node of the configuration to the object or the settings that it describes."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from fellrec.errors import ConfigError, unknown

T = TypeVar("T")


def as_dict(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The resolved configuration as plain Python values."""
    plain = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def settings(kind: type[T], config: DictConfig | Mapping[str, Any], label: str) -> T:
    """Make a dataclass of settings from a node.

    Args:
        kind: The dataclass.
        config: Values of its fields; a field that is absent has its default.
        label: The node's key for messages, such as ``trainer``; empty for the root.

    Raises:
        ConfigError: If a setting is unknown or out of range, or one without a default is absent.
    """
    given, hints = as_dict(config), get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    _refuse_unknown(given, known, label)
    needed = [name for name, field in known.items() if field.default is field.default_factory is MISSING]
    _refuse_absent(given, needed, label)
    return kind(
        **{
            name: settings(hints[name], value, _dotted(label, name)) if is_dataclass(hints[name]) else value
            for name, value in given.items()
        }
    )


def instantiate(
    config: DictConfig | Mapping[str, Any],
    label: str,
    offered: Mapping[str, Any] | None = None,
    of: type | None = None,
    **arguments: Any,
) -> Any:
    """Make the object that ``config._target_`` names, from the other settings of the node and some live objects.

    A class takes its settings as arguments, or as one argument ``settings`` whose annotation is a dataclass.

    Args:
        config: A node with ``_target_``.
        label: The node's key for messages, such as ``objective``.
        offered: Live objects for targets that take them.
        of: The class that the target must be a subclass of; ``None`` for any.
        **arguments: Objects that do not come from the configuration.

    Raises:
        ConfigError: If the target cannot be imported or does not take these settings.
    """
    given = as_dict(config)
    target = import_target(given.pop("_target_", None), label, of)
    parameters = inspect.signature(target).parameters
    wanted = parameters.keys() - given.keys()  # what is configured comes before what is offered
    live = {**{name: value for name, value in (offered or {}).items() if name in wanted}, **arguments}
    if kind := settings_class(target):
        return target(settings=settings(kind, given, label), **live)
    _check_arguments(parameters, given, live, label)
    return target(**given, **live)


def import_target(name: Any, label: str, of: type | None = None) -> Any:
    """What a dotted name stands for.

    Raises:
        ConfigError: If it cannot be imported, or is not a subclass of ``of``.
    """
    try:
        target = get_object(name)
    except Exception as error:  # Hydra wraps whatever the import raised
        raise ConfigError(f"{label}._target_={name} cannot be imported: {' '.join(str(error).split())}") from error
    if of is not None and not (isinstance(target, type) and issubclass(target, of) and target is not of):
        raise ConfigError(f"{label}._target_={name} is not a subclass of {of.__name__}")
    return target


def settings_class(target: Any) -> type | None:
    """The dataclass that a class takes as ``settings``; ``None`` if its settings are its arguments."""
    if "settings" not in inspect.signature(target).parameters:
        return None
    kind = inspect.signature(target, eval_str=True).parameters["settings"].annotation
    return kind if isinstance(kind, type) and is_dataclass(kind) else None


def setting_names(target: Any) -> list[str]:
    """Names of all settings that a class takes."""
    if kind := settings_class(target):
        return [field.name for field in fields(kind)]
    return list(inspect.signature(target).parameters)


def _check_arguments(
    parameters: Mapping[str, inspect.Parameter], given: Mapping[str, Any], live: Collection[str], label: str
) -> None:
    kinds = {parameter.kind for parameter in parameters.values()}
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        _refuse_unknown(given, [name for name in parameters if name not in live], label)
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in live
    ]
    _refuse_absent(given, needed, label)


def _refuse_unknown(given: Collection[str], known: Collection[str], label: str) -> None:
    for name in given:
        if name not in known:
            choices = [_dotted(label, other) for other in known]
            if not choices:
                raise ConfigError(f"this {label} has no setting {name!r}: it has none")
            raise ConfigError(unknown("setting", _dotted(label, name), choices))


def _refuse_absent(given: Mapping[str, Any], needed: Collection[str], label: str) -> None:
    for name in needed:
        if name not in given:
            raise ConfigError(f"{_dotted(label, name)} needs a value: give +{_dotted(label, name)}=…")


def _dotted(label: str, name: str) -> str:
    return f"{label}.{name}" if label else name
