"""What a comparison runs: from the words of a command to configurations, and what each is called."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from fellrec.config.compose import compose, without_launcher
from fellrec.config.instantiate import as_dict
from fellrec.config.sweep import expand
from fellrec.errors import ConfigError
from fellrec.experiment.names import rule_name, run_name
from fellrec.functional.nested import flatten

_DEFAULT_RULES = "aggregation=local,fedavg,fellrec,centralized"
TRAINING = (
    "num_rounds",
    "local_epochs",
    "max_local_steps",
    "batch_size",
    "accumulate_grad_batches",
    "learning_rate",
    "weight_decay",
    "warmup_steps",
    "learning_rate_decay",
    "gradient_clip",
    "reset_optimizer",
    "patience",
    "select",
)
"""Settings under ``trainer`` that a comparison may vary: how clients train, not how they are evaluated."""


def configurations(overrides: Sequence[str], runs: Sequence[str] = ()) -> list[DictConfig]:
    """One configuration per combination; where nothing but seeds is compared, over the rules that are always shown.

    Where several rules are named, a setting of rules is for those that have it, see `fellrec.config.sweep`.

    Args:
        overrides: Hydra overrides, with comma-separated values; what all have in common.
        runs: Further overrides in one text each: every text is combined with ``overrides``, the texts not with each
            other. So every rule can have settings of its own.

    Raises:
        ConfigError: If a text or an override cannot be read, or a setting is not allowed.
    """
    given = [_words(run) for run in runs]
    configs = [without_launcher(compose(combination)) for combination in expand(overrides, given)]
    named = any(item.startswith("aggregation=") for item in overrides)
    if not (named or runs or any(_cuts(configs))):
        configs = [without_launcher(compose(combination)) for combination in expand([*overrides, _DEFAULT_RULES])]
    return list({repr(as_dict(config)): config for config in configs}.values())


def _words(run: str) -> list[str]:
    try:
        words = shlex.split(run)
    except ValueError as error:
        raise ConfigError(f"cannot read --run {run!r}: {error}") from error
    if not words or any(word.startswith("-") for word in words):
        raise ConfigError(f"--run {run!r} must be overrides, such as --run 'aggregation=fedavg trainer.num_rounds=5'")
    return words


@dataclass(frozen=True)
class Label:
    """What tells a run of a comparison from the others.

    Attributes:
        rule: With the settings that vary, such as ``fellrec alpha=0.3``.
        variant: What varies of the split, such as ``head_layers=2``; empty if nothing does.
        seed: Of the run.
    """

    rule: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """For files."""
        return run_name(self.rule, self.variant, self.seed)


def labels(configs: Sequence[DictConfig]) -> list[Label]:
    """What to call each configuration: by what it does not share with the others."""
    columns = zip(configs, _settings(configs), _training(configs), _cuts(configs), strict=True)
    return [
        Label(" ".join(part for part in (rule_name(config), settings, training) if part), variant, config.seed)
        for config, settings, training, variant in columns
    ]


def _settings(configs: Sequence[DictConfig]) -> list[str]:
    """The settings of each configuration's rule that vary among those of the same rule."""
    rules = [str(config.aggregation.get("_target_")) for config in configs]
    settings = [as_dict(config.aggregation) for config in configs]
    of_rule = {rule: [own for name, own in zip(rules, settings, strict=True) if name == rule] for rule in rules}
    return [_varying(own, of_rule[rule]) for rule, own in zip(rules, settings, strict=True)]


def _training(configs: Sequence[DictConfig]) -> list[str]:
    """What the training of each configuration has of its own."""
    flat = [{name: config.trainer[name] for name in TRAINING} for config in configs]
    return [_varying(own, flat) for own in flat]


def _cuts(configs: Sequence[DictConfig]) -> list[str]:
    """What the split of each configuration has of its own."""
    flat = [flatten(as_dict(config.split)) for config in configs]
    return [_varying(own, flat) for own in flat]


def _varying(own: Mapping[str, Any], everyone: Sequence[Mapping[str, Any]]) -> str:
    keys = [key for key in own if len({repr(settings.get(key)) for settings in everyone}) > 1]
    return " ".join(f"{key}={str(own[key]).lower()}" for key in keys)


def check_comparable(configs: Sequence[DictConfig]) -> None:
    """Refuse comparisons over anything but rules, their settings, how clients train, seeds and the split.

    Raises:
        ConfigError: Naming the settings that differ, or the name that two runs would have.
    """
    flat = [flatten(as_dict(config)) for config in configs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    differing = [key for key in keys if len({repr(settings.get(key)) for settings in flat}) > 1]
    allowed = {"seed", *(f"trainer.{name}" for name in TRAINING)}
    other = [key for key in differing if key not in allowed and not key.startswith(("aggregation.", "split."))]
    if other:
        raise ConfigError(
            f"compare varies aggregation, the training's settings under trainer, seed and split only, not "
            f"{', '.join(other)}; use fellrec train -m for other sweeps"
        )
    names = labels(configs)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(
            f"two runs would both be called {twice.name}: rules are told apart by the names of their classes"
        )
    if any(config.split.transport == "distributed" for config in configs):
        raise ConfigError(
            "compare has no server process: split.transport=distributed is not allowed, only none or inprocess; "
            "start distributed runs by torchrun … -m fellrec train"
        )
