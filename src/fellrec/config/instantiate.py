"""From a node of the configuration to the object or the settings that it describes."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import FunctionType, SimpleNamespace
from typing import Any, TypeVar, get_type_hints

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from fellrec.errors import ConfigError, nearest_first, unknown
from fellrec.functional.ranges import Allowed, not_allowed, range_of, refuse

T = TypeVar("T")

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # logs what it raises, and the error is reported once

_OWN = "fellrec."
"""How the dotted names of the package's own classes begin."""


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
    of: type | tuple[type, ...] | None = None,
    **arguments: Any,
) -> Any:
    """Make the object that ``config._target_`` names, from the other settings of the node and some live objects.

    A class takes its settings as arguments, or as one argument ``settings`` whose annotation is a dataclass.

    Args:
        config: A node with ``_target_``.
        label: The node's key for messages, such as ``objective``.
        offered: Live objects for targets that take them.
        of: What the target must be, see `import_target`.
        **arguments: Objects that do not come from the configuration.

    Raises:
        ConfigError: If the target cannot be imported or does not take these settings.
    """
    if not isinstance(config, (Mapping, DictConfig)):
        raise ConfigError(f"{label}={config} is not allowed: settings such as {{_target_: module.Class}}")
    given = as_dict(config)
    target = import_target(given.pop("_target_", None), label, of)
    parameters = inspect.signature(target).parameters
    wanted = parameters.keys() - given.keys()  # what is configured comes before what is offered
    live = {**{name: value for name, value in (offered or {}).items() if name in wanted}, **arguments}
    if kind := settings_class(target):
        return target(settings=settings(kind, given, label), **live)
    _check_arguments(parameters, given, live, label)
    _check_types(target, given, label)
    return target(**given, **live)


def check_settings(config: Mapping[str, Any], label: str, of: type | tuple[type, ...] | None = None) -> None:
    """Check what can be known of a node before there are live objects: its class, and the names of its settings.

    Args:
        config: A node with ``_target_``.
        label: The node's key for messages.
        of: What the target must be, see `import_target`.

    Raises:
        ConfigError: If the target cannot be imported, or has no such setting.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"{label}={config} is not allowed: settings such as {{_target_: module.Class}}")
    given = {name: value for name, value in config.items() if name != "_target_"}
    target = import_target(config.get("_target_"), label, of)
    if kind := settings_class(target):
        settings(kind, given, label)
        return
    if not _takes_any(parameters := inspect.signature(target).parameters):
        _refuse_unknown(given, parameters, label)
    _check_types(target, given, label)


def import_target(name: Any, label: str, of: type | tuple[type, ...] | None = None) -> Any:
    """The class that a dotted name stands for.

    Names of the standard library and of private modules are refused before anything is imported.

    Args:
        name: Such as ``my_module.MyRule``.
        label: The node's key for messages.
        of: The class that it must be a subclass of, one of several such classes, or the protocol whose methods it must
            have; ``None`` for any.

    Raises:
        ConfigError: If it cannot be imported, or is not what it must be.
    """
    where = f"{label}._target_={name}"
    if not isinstance(name, str):
        raise ConfigError(f"{label} needs a _target_: the name of a class, such as my_module.Mine")
    if _is_never_a_choice(name):
        raise ConfigError(f"{where} is not allowed: a class of fellrec, or one of your own")
    try:
        target = get_object(name)
    except Exception as error:  # Hydra wraps whatever the import raised
        raise ConfigError(f"{where} cannot be imported: {_why_not_imported(name, error)}") from error
    if is_own(name) and not str(getattr(target, "__module__", "")).startswith(_OWN):
        raise ConfigError(f"{where} is not a class of fellrec")
    if of is not None:
        _check_kind(target, where, of)
    return target


def _why_not_imported(name: str, error: Exception) -> str:
    """Why a dotted name cannot be imported: no such module, no such class in it, or what the module raised."""
    module, _, last = name.rpartition(".")
    absent = getattr(error.__cause__, "name", None)  # of a ModuleNotFoundError
    if absent == name and module in sys.modules:
        own = [key for key, value in vars(sys.modules[module]).items() if isinstance(value, type)]
        own = [key for key in own if getattr(sys.modules[module], key).__module__.startswith(module)]
        choices = f"; choose from: {', '.join(nearest_first(last, own)[:8])}" if own else ""
        return f"module {module} has no class {last!r}{choices}"
    if absent is not None and absent == name.partition(".")[0]:
        return f"No module named {absent!r} in this directory or in the Python environment"
    cause = error.__cause__
    if cause is not None and not isinstance(cause, (ImportError, AttributeError)):
        return f"its module raised {type(cause).__name__}: {' '.join(str(cause).split())}"
    return " ".join(str(error).split())


def is_own(name: str) -> bool:
    """Whether a dotted name is one of the package's own.

    Example:
        >>> is_own("fellrec.aggregation.FedAvg"), is_own("my_rules.Median"), is_own("fellrec_more.Rule")
        (True, False, False)
    """
    return name.startswith(_OWN)


def targets(node: Any) -> Iterator[str]:
    """All values of ``_target_`` in plain values, at any depth.

    Example:
        >>> list(targets({"a": {"_target_": "x.Y", "more": [{"_target_": "z.W"}]}}))
        ['x.Y', 'z.W']
    """
    if isinstance(node, Mapping):
        if node.get("_target_") is not None:
            yield str(node["_target_"])
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from targets(value)


def _is_never_a_choice(name: str) -> bool:
    first, *others = name.split(".")
    is_private = is_own(name) and any(part.startswith("_") for part in others)
    return first in sys.stdlib_module_names or is_private


def _check_kind(target: Any, where: str, of: type | tuple[type, ...]) -> None:
    """Raise unless ``target`` is a subclass of a class, or has the methods of a protocol."""
    kinds = of if isinstance(of, tuple) else (of,)
    names = " or ".join(kind.__name__ for kind in kinds)
    if not isinstance(target, type) or target in kinds:
        raise ConfigError(f"{where} is not a subclass of {names}")
    if getattr(kinds[0], "_is_protocol", False):
        needed = _methods(kinds[0])
        absent = [name for name in needed if not callable(getattr(target, name, None))]
        if absent or getattr(target, "_is_protocol", False):
            raise ConfigError(f"{where} is not a {names}: it has no method {', '.join(absent or needed)}")
    elif not issubclass(target, kinds):
        raise ConfigError(f"{where} is not a subclass of {names}")


def _methods(protocol: type) -> list[str]:
    members = {name: member for kind in reversed(protocol.__mro__) for name, member in vars(kind).items()}
    return [name for name, member in members.items() if isinstance(member, FunctionType) and not name.startswith("_")]


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
    if not _takes_any(parameters):
        _refuse_unknown(given, [name for name in parameters if name not in live], label)
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and name not in live
    ]
    _refuse_absent(given, needed, label)


def _check_types(target: Any, given: Mapping[str, Any], label: str) -> None:
    """Refuse arguments that are not what the annotations of a class or function say, as far as settings have ranges."""
    problems = []
    for name, value in given.items():
        allowed = _range_of_parameter(vars(target).get("__init__") if isinstance(target, type) else target, name)
        if allowed is not None and not allowed.accepts(value):
            problems.append(not_allowed(_dotted(label, name), value, allowed.text_for(value)))
    refuse(*problems)


def _range_of_parameter(function: Any, name: str) -> Allowed | None:
    """What the annotation of a parameter allows; ``None`` for anything, and for names that type checkers only know."""
    annotation = getattr(function, "__annotations__", {}).get(name)
    try:
        alone = SimpleNamespace(__annotations__={name: annotation})
        return range_of(get_type_hints(alone, getattr(function, "__globals__", {}), include_extras=True)[name])
    except (NameError, TypeError, AttributeError, SyntaxError):
        return None


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())


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
