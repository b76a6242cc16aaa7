"""From the ``aggregation`` group of the configuration to a rule."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.fellrec import FELLRec
from fellrec.errors import ConfigError, unknown

_log = logging.getLogger(__name__)


def build_aggregation(cfg: DictConfig | Mapping[str, Any]) -> AggregationCallback:
    """Build the rule that ``cfg`` names.

    A setting that is null is left to the rule's own default. FELLRec's settings may stand beside any rule, so that one
    sweep over ``aggregation.alpha`` covers several rules and ``aggregation._target_=my_package.MyRule`` needs no other
    override; where the rule does not have them, they are ignored with one warning.

    Args:
        cfg: ``_target_``, the dotted name of an `AggregationCallback`, and its settings.

    Returns:
        The rule.

    Raises:
        ConfigError: If the class cannot be imported or is no aggregation rule, a setting is unknown, one that the rule
            needs is missing, or a value is not allowed.

    Example:
        >>> build_aggregation({"_target_": "fellrec.aggregation.FELLRec", "alpha": 0.3, "beta": None}).alpha
        0.3
    """
    rule, settings = _import_rule(cfg.get("_target_")), effective_settings(cfg)
    needless = [name for name, value in _given(cfg).items() if value is not None and name not in settings]
    if needless:
        _log.warning("aggregation rule %s has no setting %s: ignored", rule.__name__, ", ".join(needless))
    return rule(**settings)


def effective_settings(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """The settings that reach the rule that ``cfg`` names: neither nulls nor those that it does not have.

    Raises:
        ConfigError: As `build_aggregation`.

    Example:
        >>> effective_settings({"_target_": "fellrec.aggregation.FedAvg", "alpha": 0.3})
        {}
    """
    given = {name: value for name, value in _given(cfg).items() if value is not None}
    return _settings_for(_import_rule(cfg.get("_target_")), given)


def _given(cfg: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg, resolve=True) if isinstance(cfg, DictConfig) else dict(cfg)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items() if key != "_target_"}


def _import_rule(target: object) -> type[AggregationCallback]:
    module, _, name = str(target).rpartition(".")
    try:
        rule = getattr(import_module(module), name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise ConfigError(
            f"aggregation._target_ is {target!r}, which cannot be imported ({type(error).__name__}: {error}); "
            "needed is the dotted name of an AggregationCallback, such as fellrec.aggregation.FedAvg"
        ) from error
    if not (isinstance(rule, type) and issubclass(rule, AggregationCallback)) or rule is AggregationCallback:
        raise ConfigError(f"aggregation._target_ is {target!r}, which is no subclass of AggregationCallback")
    return rule


def _settings_for(rule: type[AggregationCallback], given: dict[str, Any]) -> dict[str, Any]:
    """The settings that ``rule`` takes."""
    parameters = inspect.signature(rule).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return given
    needless = [name for name in given if name not in parameters]
    shared = inspect.signature(FELLRec).parameters
    for name in needless:
        if name not in shared:
            raise ConfigError(unknown("aggregation setting", name, [*parameters, *shared]))
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL and name not in given
    ]
    if missing:
        raise ConfigError(f"aggregation rule {rule.__name__} needs a value for aggregation.{missing[0]}")
    return {name: value for name, value in given.items() if name in parameters}
