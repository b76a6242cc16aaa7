"""Number types of weights and computations, which several settings determine together."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning import Fabric
from lightning.fabric.plugins import HalfPrecision, MixedPrecision, Precision
from omegaconf import DictConfig

from fellrec.cut.settings import UNCHANGED
from fellrec.errors import ConfigError
from fellrec.functional.ranges import refuse
from fellrec.models.settings import HfSettings

AUTO = "auto"
"""Value of a setting that is chosen by a measurement, see ``fellrec.experiment.auto``."""


class ChosenPrecision(Precision):
    """Fabric's precision with ``trainer.precision=auto``: 32-true until one is chosen, after the processes started."""

    def __init__(self) -> None:
        self._chosen = Precision()

    def use(self, name: str, device: torch.device) -> None:
        """Compute in this precision from now on.

        Args:
            name: 32-true, bf16-mixed or bf16-true.
            device: Where.
        """
        if name == "bf16-mixed":
            self._chosen = MixedPrecision("bf16-mixed", device.type)
        else:
            self._chosen = HalfPrecision("bf16-true") if name == "bf16-true" else Precision()

    def forward_context(self) -> AbstractContextManager[Any]:
        """See ``Precision``."""
        return self._chosen.forward_context()


def use_precision(fabric: Fabric, config: DictConfig) -> None:
    """Let a Fabric that was made with ``trainer.precision=auto`` compute in what was chosen for a run."""
    plugin, name = fabric.strategy.precision, config.trainer.precision
    if isinstance(plugin, ChosenPrecision) and name != AUTO:
        plugin.use(name, fabric.device)


def weights_dtype(config: DictConfig) -> str:
    """Name of the type of the backbone's weights: ``bfloat16`` with ``trainer.precision=bf16-true``, else its own.

    Raises:
        ConfigError: If ``trainer.precision`` and ``backbone.dtype`` exclude each other.
    """
    own = str(config.backbone.get("dtype") or HfSettings.dtype)
    if config.trainer.precision != "bf16-true":
        return own
    if own == "float16":
        raise ConfigError("trainer.precision=bf16-true and backbone.dtype=float16 exclude each other; give one of them")
    return "bfloat16"


def check_precision(config: DictConfig, device: torch.device) -> None:
    """Refuse types that the device cannot compute with, and those that would have no effect.

    Args:
        config: The configuration of a run.
        device: Where it computes.

    Raises:
        ConfigError: With one line for each problem.
    """
    refuse(
        _half_on_cpu(config, device),
        _half_through_the_cut(config),
        _trained_in_half(config),
        _quantised(config, device),
        *_sent_nowhere(config),
    )


def _half_on_cpu(config: DictConfig, device: torch.device) -> str | None:
    if config.trainer.precision != "16-mixed" or device.type == "cuda":
        return None
    return f"trainer.precision=16-mixed needs a GPU, and this run is on {device.type}; give bf16-mixed or 32-true"


def _half_through_the_cut(config: DictConfig) -> str | None:
    if config.trainer.precision != "16-mixed" or config.split.transport == "none":
        return None
    return (
        f"trainer.precision=16-mixed needs split.transport=none, it is {config.split.transport}: the server does not "
        "know the scale of the loss"
    )


def _trained_in_half(config: DictConfig) -> str | None:
    if config.backbone.get("dtype") != "float16" or not trains_all(config):
        return None
    return (
        "backbone.dtype=float16 needs adapter=lora: AdamW's moments of weights in float16 underflow; with adapter=full "
        "give float32, or bfloat16"
    )


def _quantised(config: DictConfig, device: torch.device) -> str | None:
    bits, given = config.backbone.get("quantize"), f"backbone.quantize={config.backbone.get('quantize')}"
    if bits is None:
        return None
    if trains_all(config):
        return f"{given} needs adapter=lora: quantised weights cannot be trained"
    if config.split.transport != "none":
        return f"{given} needs split.transport=none, it is {config.split.transport}"
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"{given} needs the package bitsandbytes, which is not installed: pip install bitsandbytes"
    if bits == "4bit" and device.type == "cpu":
        return f"{given} needs a GPU: on the CPU bitsandbytes gives no gradients through 4-bit weights; give 8bit"
    return None


def trains_all(config: DictConfig) -> bool:
    """Whether the weights of the backbone are trained themselves."""
    return str(config.adapter.get("_target_")).endswith("FullAdapter")


def _sent_nowhere(config: DictConfig) -> list[str]:
    if config.split.transport != "none":
        return []
    return [
        f"split.{name}={value} has no effect with split.transport=none, where nothing is sent; give "
        "split.transport=inprocess or distributed"
        for name, plain in UNCHANGED.items()
        if (value := config.split.get(name, plain)) != plain
    ]
