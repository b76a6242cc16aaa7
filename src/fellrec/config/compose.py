"""Configuration: where it lies, how overrides are composed, and what is checked before anything starts."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fellrec.config.paths import conf_dir, group_choices
from fellrec.errors import ConfigError, nearest_first, unknown
from fellrec.functional.nested import flatten
from fellrec.functional.packing import PACKINGS
from fellrec.functional.schedules import DECAYS
from fellrec.rankers.reference import SHOWN

_GROUPS_WITHOUT_CHOICE = ("participation", "references", "split", "trainer", "tracking")
"""Groups whose settings are the same in every run, so that one that is absent has its default."""


def compose(overrides: Sequence[str], optional: Collection[str] = ()) -> DictConfig:
    """Compose the configuration for one run.

    Args:
        overrides: Hydra overrides such as ``aggregation=fedavg`` or ``trainer.num_rounds=3``.
        optional: Keys that the verb can do without: they may stay without a value.

    Raises:
        ConfigError: For an unknown key or choice (the nearest names come first), a malformed override, or a value
            that is out of range.
    """
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            config = hydra_compose("config", overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_explain(error, overrides)) from error
    check(config, optional)
    _make_paths_absolute(config)
    return config


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Expand comma-separated values into one list of overrides per combination, the last key varying fastest.

    Raises:
        ConfigError: For a malformed override.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException as error:
        raise ConfigError(f"cannot read the overrides: {str(error).splitlines()[0]}") from error
    axes = [
        [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override()
        else [str(item.input_line)]
        for item in parsed
    ]
    return [list(combination) for combination in itertools.product(*axes)]


def without_launcher(config: DictConfig) -> DictConfig:
    """The experiment alone: where it runs is no part of it."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "launcher"])


def read_config(run_dir: Path) -> DictConfig:
    """The configuration that a run was started with; settings that did not exist then have their defaults.

    Raises:
        ConfigError: If the directory is no run's.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"{run_dir} has no config.yaml; give the directory of a run")
    config, defaults = OmegaConf.load(path), compose([])
    assert isinstance(config, DictConfig)
    for group in _GROUPS_WITHOUT_CHOICE:
        config[group] = OmegaConf.merge(defaults[group], config.get(group, {}))
    return config


def as_dict(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain Python values."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def _make_paths_absolute(config: DictConfig) -> None:
    """A run directory's configuration must mean the same from any folder."""
    if config.data.root is not None:
        config.data.root = str(Path(config.data.root).expanduser().resolve())
    for key in ("path", "config"):
        value = config.backbone.get(key)
        if value and Path(str(value)).expanduser().exists():
            config.backbone[key] = str(Path(str(value)).expanduser().resolve())


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    text = str(error) or str(error.__cause__)
    missing = re.search(r"Could not find '([\w./-]+)/([^'/]*)'", text)
    if missing:
        group, choice = missing.groups()
        return unknown(group, choice, group_choices().get(group, []))
    bad_key = re.search(r"Could not override '([^']+)'", text) or re.search(r"Key '([^']+)' is not in struct", text)
    if bad_key:
        return _unknown_key(bad_key.group(1))
    no_value = re.search(r"Missing mandatory value: ([\w.]+)", text)
    if no_value:
        return f"{no_value.group(1)} needs a value: give {no_value.group(1)}=…"
    return f"cannot compose {' '.join(overrides)}: {text.splitlines()[0]}"


def _unknown_key(key: str) -> str:
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        base = hydra_compose("config")
    known = OmegaConf.to_container(base, resolve=False)
    assert isinstance(known, dict)
    names = list(flatten(known)) + sorted(group_choices())
    parent = key.rpartition(".")[0]
    siblings = [name for name in names if name.startswith(f"{parent}.")] if parent else []
    choices = siblings or nearest_first(key, names)[:8]
    return unknown("setting", key, choices)


@dataclass(frozen=True)
class _Rule:
    key: str
    accepts: Callable[[Any], bool]
    allowed: str


def _integer(least: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(low: float, high: float = float("inf"), open_low: bool = False) -> Callable[[Any], bool]:
    def accepts(value: Any) -> bool:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and (low < value if open_low else low <= value) and value <= high

    return accepts


def _optional(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accepts(value)


def _one_of(*choices: Any) -> Callable[[Any], bool]:
    return lambda value: value in choices


def _cutoffs(value: Any) -> bool:
    return bool(value) and all(_integer(1)(cutoff) for cutoff in value)


def _references(value: Any) -> bool:
    return OmegaConf.is_list(value) and all(name in SHOWN for name in value) and len(set(value)) == len(value)


_AT_LEAST_1, _AT_LEAST_0 = "a whole number of at least 1", "a whole number of at least 0"
_RULES = (
    _Rule("seed", _integer(0), _AT_LEAST_0),
    _Rule("trainer.num_rounds", _integer(1), _AT_LEAST_1),
    _Rule("trainer.local_epochs", _integer(1), _AT_LEAST_1),
    _Rule("trainer.max_local_steps", _optional(_integer(1)), f"{_AT_LEAST_1}, or null"),
    _Rule("trainer.batch_size", _integer(1), _AT_LEAST_1),
    _Rule("trainer.eval_batch_size", _integer(1), _AT_LEAST_1),
    _Rule("trainer.learning_rate", _number(0, open_low=True), "a number above 0"),
    _Rule("trainer.weight_decay", _number(0), "a number of at least 0"),
    _Rule("trainer.warmup_steps", _integer(0), _AT_LEAST_0),
    _Rule("trainer.learning_rate_decay", _one_of(*DECAYS), ", ".join(DECAYS)),
    _Rule("trainer.gradient_clip", _optional(_number(0, open_low=True)), "a number above 0, or null"),
    _Rule("trainer.reset_optimizer", _one_of(True, False), "true or false"),
    _Rule("trainer.evaluate_every", _integer(1), _AT_LEAST_1),
    _Rule("trainer.checkpoint_every", _integer(1), _AT_LEAST_1),
    _Rule("trainer.checkpoints_kept", _integer(1), _AT_LEAST_1),
    _Rule("trainer.patience", _optional(_integer(1)), f"{_AT_LEAST_1}, or null"),
    _Rule("trainer.select", _one_of("population", "client"), "population or client"),
    _Rule("trainer.cutoffs", _cutoffs, "a list of whole numbers of at least 1, such as [5,10]"),
    _Rule("trainer.sampled_candidates", _optional(_integer(1)), f"{_AT_LEAST_1}, or null"),
    _Rule("trainer.cold_users_below", _integer(1), _AT_LEAST_1),
    _Rule("trainer.devices", lambda value: value == "auto" or _integer(1)(value), f"{_AT_LEAST_1}, or auto"),
    _Rule("trainer.num_nodes", _integer(1), _AT_LEAST_1),
    _Rule("trainer.devices_per_client", _integer(1), _AT_LEAST_1),
    _Rule("trainer.timeout_seconds", _number(0, open_low=True), "a number above 0"),
    _Rule("trainer.precision", _one_of("32-true", "bf16-mixed", "bf16-true"), "32-true, bf16-mixed or bf16-true"),
    _Rule("trainer.accumulate_grad_batches", _integer(1), _AT_LEAST_1),
    _Rule("participation.on_failure", _one_of("stop", "skip"), "stop or skip"),
    _Rule("participation.quorum", _number(0, 1, open_low=True), "a number in (0, 1]"),
    _Rule("participation.rate", _number(0, 1, open_low=True), "a number in (0, 1]"),
    _Rule("data.max_history", _integer(1), _AT_LEAST_1),
    _Rule("data.max_train_samples", _optional(_integer(1)), f"{_AT_LEAST_1}, or null"),
    _Rule("data.max_users", _optional(_integer(1)), f"{_AT_LEAST_1}, or null"),
    _Rule("data.public_user_rate", lambda value: _number(0)(value) and value < 1, "a number in [0, 1)"),
    _Rule("partition.num_clients", _optional(_integer(1)), f"{_AT_LEAST_1}, or null"),
    _Rule("split.head_layers", _integer(0), _AT_LEAST_0),
    _Rule("split.tail_layers", _integer(0), _AT_LEAST_0),
    _Rule("split.transport", _one_of("none", "inprocess", "distributed"), "none, inprocess or distributed"),
    _Rule("split.hidden_dtype", _one_of(*PACKINGS), ", ".join(PACKINGS)),
    _Rule("split.gradient_dtype", _one_of(*PACKINGS), ", ".join(PACKINGS)),
    _Rule("references.show", _references, f"a list, each once, of {', '.join(SHOWN)}"),
    _Rule("references.neighbours", _integer(1), _AT_LEAST_1),
    _Rule("references.shrink", _number(0), "a number of at least 0"),
    _Rule("references.factors", _integer(1), _AT_LEAST_1),
    _Rule("tracking.on_unreachable", _one_of("stop", "keep"), "stop or keep"),
    _Rule("tracking.max_logged_clients", _integer(0), _AT_LEAST_0),
    _Rule("split.timeout_seconds", _number(0, open_low=True), "a number above 0"),
)
_LAUNCHER_RULES = (
    _Rule("launcher.nodes", _integer(1), _AT_LEAST_1),
    _Rule("launcher.gpus_per_node", _integer(0), _AT_LEAST_0),
    _Rule("launcher.tasks_per_node", _optional(_integer(1)), f"{_AT_LEAST_1}, or null"),
    _Rule("launcher.cpus_per_task", _optional(_integer(1)), f"{_AT_LEAST_1}, or null"),
    _Rule("launcher.signal_seconds", _integer(1), _AT_LEAST_1),
    _Rule("launcher.requeue", _one_of(True, False), "true or false"),
    _Rule("launcher.max_requeues", _integer(0), _AT_LEAST_0),
    _Rule("launcher.max_parallel", _optional(_integer(1)), f"{_AT_LEAST_1}, or null"),
    _Rule("launcher.setup", OmegaConf.is_list, "a list, such as [module load cuda]"),
    _Rule("launcher.container_options", OmegaConf.is_list, "a list, such as [--bind,/scratch]"),
    _Rule("launcher.environment", _optional(OmegaConf.is_dict), "a mapping, such as {NAME: value}, or null"),
    _Rule("launcher.options", _optional(OmegaConf.is_dict), "a mapping, such as {constraint: a100}, or null"),
)


def check(config: DictConfig, optional: Collection[str] = ()) -> None:
    """Check every setting whose range is known, and name all that are wrong in one error.

    Args:
        config: The composed configuration.
        optional: Keys that may stay without a value.

    Raises:
        ConfigError: With one line per problem: the key, the value, what is allowed.
    """
    problems = []
    for rule in (*_RULES, *(_LAUNCHER_RULES if "launcher" in config else ())):  # a run that goes on has none
        try:
            value = OmegaConf.select(config, rule.key, throw_on_missing=True)
        except OmegaConfBaseException:
            problems.append(f"{rule.key} needs a value: give {rule.key}=…")
            continue
        if not rule.accepts(value):
            problems.append(f"{rule.key}={value} is not allowed: {rule.allowed}")
    problems += [f"{key} needs a value: give {key}=…" for key in _missing(config) if key not in optional]
    problems += _check_metric(config)
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))


def _missing(config: DictConfig) -> list[str]:
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    return [key for key, value in flatten(plain).items() if value == "???"]


def _check_metric(config: DictConfig) -> list[str]:
    cutoffs = config.trainer.cutoffs
    if not _cutoffs(cutoffs):
        return []
    metrics = [f"{name}_at_{cutoff}" for name in ("ndcg", "recall", "hr", "mrr") for cutoff in cutoffs]
    metric = config.trainer.metric
    return [] if metric in metrics else [unknown("trainer.metric", metric, metrics)]


def make(config: DictConfig, label: str, offered: Mapping[str, Any] | None = None, **arguments: Any) -> Any:
    """Instantiate ``config._target_`` with the configured settings and some live objects.

    Args:
        config: A node with ``_target_``.
        label: The node's name for messages, such as ``objective``.
        offered: Live objects for targets that take them.
        **arguments: Objects that do not come from the configuration.

    Raises:
        ConfigError: If the target cannot be imported or does not take these settings.
    """
    try:
        target = get_object(config["_target_"])
    except Exception as error:  # Hydra wraps whatever the import raised
        raise ConfigError(f"{label}._target_={config['_target_']} cannot be imported: {error}") from error
    settings = {str(key): value for key, value in as_dict(config).items() if key != "_target_"}
    accepted = inspect.signature(target).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    for name in settings:
        if name not in accepted and not takes_any:
            raise ConfigError(unknown(f"setting of {label}", f"{label}.{name}", [f"{label}.{key}" for key in accepted]))
    taken = {name: value for name, value in (offered or {}).items() if name in accepted and name not in settings}
    return target(**settings, **arguments, **taken)
