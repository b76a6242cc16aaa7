"""``exchange.transforms``: short names, and which transforms can follow one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fellrec.config.instantiate import settings
from fellrec.config.registry import defaults_of
from fellrec.errors import ConfigError, unknown
from fellrec.federated.transform_settings import TRANSFORMS


def expand_transforms(config: DictConfig) -> None:
    """Replace short names of transforms by their classes and all their settings."""
    try:
        exchange = config.get("exchange")
        given = OmegaConf.select(config, "exchange.transforms") if OmegaConf.is_dict(exchange) else None
    except OmegaConfBaseException:  # an interpolation that cannot be resolved, which `check` reports
        return
    if OmegaConf.is_list(given):
        nodes = OmegaConf.to_container(given, resolve=False)
        assert isinstance(nodes, list)
        expanded = [_expanded(node) for node in nodes]
        _check_order(expanded)
        config.exchange.transforms = expanded


_NOT_AFTER = {"topk": ("clip", "topk"), "quantise": ("clip", "noise", "topk", "quantise")}
"""Transforms that need the entries of an update, by the one after which there are places or levels instead."""


def _check_order(nodes: Sequence[Any]) -> None:
    names = {target: name for name, (target, _) in TRANSFORMS.items()}
    before: list[str] = []
    for node in nodes:
        name = names.get(str(node.get("_target_")), "") if isinstance(node, Mapping) else ""
        if wrong := [earlier for earlier in before if name in _NOT_AFTER.get(earlier, ())]:
            raise ConfigError(
                f"exchange.transforms: {name} after {wrong[0]} is not allowed; the order is clip, noise, topk, quantise"
            )
        if name == "quantise" and "topk" in before and node.get("error_feedback", True) is True:
            raise ConfigError(
                "exchange.transforms: quantise after topk has no error feedback, because the entries are others in "
                "every round; give {name: quantise, error_feedback: false}"
            )
        before.append(name)


def _expanded(node: Any) -> Any:
    named = {"name": node} if isinstance(node, str) else node
    name = named.get("name") if isinstance(named, Mapping) and "_target_" not in named else None
    if not isinstance(name, str) or ("." in name and isinstance(node, str)):
        return node
    if name not in TRANSFORMS:
        raise ConfigError(unknown("transform", name, TRANSFORMS))
    target, kind = TRANSFORMS[name]
    values = {key: value for key, value in named.items() if key != "name"}
    settings(kind, {key: value for key, value in values.items() if not _is_interpolation(value)}, "exchange.transforms")
    return {"_target_": target, **defaults_of(kind), **values}


def _is_interpolation(value: Any) -> bool:
    return isinstance(value, str) and "${" in value
