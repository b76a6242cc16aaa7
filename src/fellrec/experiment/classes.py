"""Which kind of class each place of a configuration takes, checked for all places before anything is made of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from fellrec.aggregation.base import AggregationCallback
from fellrec.config.instantiate import as_dict, check_settings, settings
from fellrec.config.members import OF_MEMBER, is_federation, key_of_member, member_configs
from fellrec.data.holdout import Holdout
from fellrec.data.partition import Partition
from fellrec.data.schema import Reader
from fellrec.errors import ConfigError
from fellrec.experiment.build import build_rule, build_sampler
from fellrec.experiment.fabric import PLUGINS
from fellrec.federated.callback import FederatedCallback
from fellrec.federated.exchange import Transform
from fellrec.federated.poison import problems
from fellrec.federated.populations import OneForAll
from fellrec.federated.samplers import Sampler
from fellrec.federated.settings import PoisonSettings
from fellrec.functional.ranges import refuse
from fellrec.models.adapters import AdapterKind
from fellrec.models.module import Objective, Ranker

log = logging.getLogger(__name__)

KINDS: Mapping[str, type] = {
    "data.reader": Reader,
    "holdout": Holdout,
    "partition": Partition,
    "objective": Objective,
    "adapter": AdapterKind,
    "participation.sampler": Sampler,
    "ranker": Ranker,
}
"""The protocols, by the key of the node that names a class."""


def check_classes(config: DictConfig) -> None:
    """Import every class that the configuration names, and build rule and sampler, before data or models are loaded.

    Raises:
        ConfigError: If a class cannot be imported or is not what its place takes, or the rule does not take its
            settings, or there is no such setting.
        DataError: If the sampler's file cannot be used.
    """
    for key, node, kind in _places(config):
        check_settings(node, key, kind)
    for name, node in as_dict(config.callbacks).items():
        if "run_dir" in (node or {}):
            raise ConfigError(f"callbacks.{name}.run_dir is not allowed: a callback is given the directory of its run")
    build_rule(config)
    build_sampler(config)
    num_clients = OmegaConf.select(config, "partition.num_clients")
    if isinstance(num_clients, int) and not is_federation(config):
        refuse(*problems(settings(PoisonSettings, config.poison, "poison"), num_clients))


def check_transforms(configs: Sequence[DictConfig]) -> None:
    """Refuse what changes the exchange where clients exchange nothing, before data or models are loaded.

    Args:
        configs: All that one command runs: among rules that exchange updates, one that does not is named in a warning,
            as it may be what they are compared with.

    Raises:
        ConfigError: If no rule exchanges updates.
    """
    _check_effect("exchange.transforms", [config for config in configs if config.exchange.transforms])
    _check_effect("poison.clients", [config for config in configs if config.poison.clients])
    _check_effect("exchange.secure", [config for config in configs if config.exchange.secure], off="false")


def _check_effect(what: str, configs: Sequence[DictConfig], off: str = "[]") -> None:
    """Refuse a setting that changes what clients send if no rule exchanges updates."""
    rules = [(config, build_rule(config)) for config in configs]
    silent = [rule.name for config, rule in rules if rule.sees == "nothing" and not _flips_labels(what, config, rule)]
    if not silent:
        return
    names = ", ".join(f"aggregation={name}" for name in dict.fromkeys(silent))
    problem = f"{what} has no effect with {names}, where no update leaves a client"
    if len(silent) == len(configs):
        raise ConfigError(f"{problem}; use {what}={off}")
    log.warning(problem)


def _flips_labels(what: str, config: DictConfig, rule: AggregationCallback) -> bool:
    """Whether a client trains on other rows, which needs no exchange, but training by client."""
    return what == "poison.clients" and config.poison.kind == "label_flip" and rule.population is not OneForAll


def _places(config: DictConfig) -> Iterator[tuple[str, Any, type | tuple[type, ...]]]:
    plain, members = as_dict(config), member_configs(config)
    for key, kind in KINDS.items():
        if not (members and key == "data.reader"):
            yield key, OmegaConf.to_container(OmegaConf.select(config, key), resolve=True), kind
    for name, own in members.items():
        for key in ("data.reader", *OF_MEMBER):
            yield key_of_member(name, key), OmegaConf.to_container(OmegaConf.select(own, key), resolve=True), KINDS[key]
    for name, node in plain["callbacks"].items():
        if node is not None:
            yield f"callbacks.{name}", node, FederatedCallback
    yield from (("exchange.transforms", node, Transform) for node in plain["exchange"]["transforms"])
    yield from (("trainer.plugins", node, PLUGINS) for node in plain["trainer"]["plugins"] or ())
