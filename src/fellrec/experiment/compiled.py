"""Layers compiled by ``torch.compile``: ``trainer.compile``."""

from __future__ import annotations

import os
import shutil

import torch
from omegaconf import DictConfig, OmegaConf

from fellrec.errors import ConfigError
from fellrec.models.architectures import decoder_layers
from fellrec.models.split import SplitModel


def compile_layers(model: SplitModel, device: torch.device) -> None:
    """Compile the forward and backward pass of every decoder layer, when it is first needed, for any length of a batch.

    Hooks of a layer, which give it its random numbers, stay outside. Random numbers inside are PyTorch's own.

    Args:
        model: With its adapter attached.
        device: Where it computes.

    Raises:
        ConfigError: If the device is a CPU and no C++ compiler is installed.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(f"trainer.compile=true needs a C++ compiler on a CPU; {compiler} is not installed")
    for layer in decoder_layers(model.model, model.arch):
        layer.forward = torch.compile(layer.forward, dynamic=True, options={"fallback_random": True})


def compile_problems(config: DictConfig) -> list[str]:
    """What of a configuration excludes compiled layers; one line each, before anything is loaded."""
    if not OmegaConf.select(config, "trainer.compile"):
        return []
    wanted = {"split.transport": "none", "trainer.clients_per_step": 1, "backbone.quantize": None}
    found = {name: OmegaConf.select(config, name, default=value) for name, value in wanted.items()}
    return [
        f"trainer.compile=true needs {name}={'null' if value is None else value}, it is {found[name]}: "
        "it is not tested with anything else"
        for name, value in wanted.items()
        if found[name] != value
    ]
