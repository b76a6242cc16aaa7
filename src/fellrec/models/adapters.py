"""Adapters, the parameters that are trained and exchanged: LoRA, or all parameters of a small backbone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_NAME

from fellrec.errors import BackboneError, nearest_first
from fellrec.functional.rng import derive_seed
from fellrec.models.architectures import ArchSpec
from fellrec.models.settings import PARTS, FullSettings, LoraSettings, parts_of
from fellrec.state.files import write_atomically

_NAME = "default"

Frozen = Callable[[], Mapping[str, torch.Tensor]]
"""Returns the frozen parameters of the whole model."""

PartOf = Callable[[str], str]
"""Returns ``head``, ``body`` or ``tail`` for a dotted name of the whole model."""


class AdapterKind(Protocol):
    """Interface of ``adapter``."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model with trainable parameters."""

    def attach(self, model: nn.Module, arch: ArchSpec, seed: int, part_of: PartOf) -> None:
        """Attach the adapter in place, make it trainable and freeze all other parameters.

        In a partial model (of a client or the server) the parameters are the same as in the whole model.
        """

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The adapter's parameters in the model, sorted by name."""

    def save(self, adapter: Mapping[str, torch.Tensor], backbone: Any, frozen: Frozen, folder: Path) -> None:
        """Write an adapter in a standard format.

        Args:
            adapter: Adapter of the whole model, parameter name → tensor.
            backbone: The ``Backbone``, for its configuration and tokenizer.
            frozen: Returns all other parameters.
            folder: Output folder.
        """


class LoraAdapter(LoraSettings):
    """Low-rank adapters of PEFT; the backbone is frozen."""

    def __post_init__(self) -> None:
        """Start without PEFT's configuration, which depends on the model."""
        super().__post_init__()
        self._config: LoraConfig | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model with trainable parameters."""
        return parts_of(self.layers)

    def attach(self, model: nn.Module, arch: ArchSpec, seed: int, part_of: PartOf) -> None:
        """Inject the adapter in float32, with an initialisation that depends on seed and name only.

        Raises:
            BackboneError: If a target matches no module; lists existing modules, closest names first.
        """
        given = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules
        targets = list(given or arch.lora_targets)
        _check_targets(model, targets)
        model.requires_grad_(False)
        if self.parts != PARTS:
            adaptable = _adaptable(model)
            targets = [name for name in adaptable if _matches(name, targets) and part_of(name) in self.parts]
            if not targets:  # a partial model without any of these parts
                return
        self._config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM" if arch.is_causal else "FEATURE_EXTRACTION",
            base_model_name_or_path=getattr(model.config, "_name_or_path", None),
        )
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(self._config, model, adapter_name=_NAME)
        cast_adapter_dtype(model, _NAME)  # as PeftModel does: small optimiser steps would be lost in half precision
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_A" in name:
                _draw(parameter, derive_seed(seed, "lora", name))

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The A and B matrices, sorted by name."""
        return dict(sorted((name, parameter) for name, parameter in model.named_parameters() if "lora_" in name))

    def save(self, adapter: Mapping[str, torch.Tensor], backbone: Any, frozen: Frozen, folder: Path) -> None:
        """Write in PEFT's format, for ``PeftModel.from_pretrained``."""
        assert self._config is not None, "attach comes before save"
        folder.mkdir(parents=True, exist_ok=True)
        modules = sorted({name.rpartition(".lora_")[0] for name in adapter})
        whole = replace(self._config, target_modules=modules) if self.parts != PARTS else self._config
        whole.save_pretrained(str(folder))
        # PEFT saves the names of the wrapped model, without the adapter name.
        named = {f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor for name, tensor in adapter.items()}
        _write(named, folder / SAFETENSORS_WEIGHTS_NAME)


class FullAdapter(FullSettings):
    """Full fine-tuning: all parameters are trained and exchanged; for small backbones."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model with trainable parameters."""
        return parts_of(self.layers)

    def attach(self, model: nn.Module, arch: ArchSpec, seed: int, part_of: PartOf) -> None:
        """Make every parameter of the parts trainable."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) in self.parts)

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters of the parts, sorted by name; tied parameters once."""
        return dict(
            sorted((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
        )

    def save(self, adapter: Mapping[str, torch.Tensor], backbone: Any, frozen: Frozen, folder: Path) -> None:
        """Write a Transformers model folder, for ``AutoModelForCausalLM`` or, with an encoder, ``AutoModel``."""
        folder.mkdir(parents=True, exist_ok=True)
        backbone.model.config.save_pretrained(folder)
        backbone.tokenizer.save_pretrained(folder)
        _write({**frozen(), **adapter}, folder / SAFE_WEIGHTS_NAME)


def save_base(weights: Mapping[str, torch.Tensor], backbone: Any, folder: Path) -> None:
    """Write a changed base as a Transformers folder.

    Args:
        weights: All weights of the backbone, by `plain_name`.
        backbone: The ``Backbone``, for its configuration and tokenizer.
        folder: Where.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backbone.model.config.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    _write(weights, folder / SAFE_WEIGHTS_NAME)


def plain_name(name: str) -> str:
    """The name of a weight in the model without PEFT's wrappers.

    Example:
        >>> plain_name("model.layers.0.self_attn.q_proj.base_layer.weight")
        'model.layers.0.self_attn.q_proj.weight'
    """
    return name.replace(".base_layer.", ".")


def name_base(folder: Path, base: Path) -> None:
    """Let the adapter in a folder name a changed base as the model that it belongs to."""
    path = folder / CONFIG_NAME
    if path.is_file():
        config = json.loads(path.read_text())
        write_atomically(path, json.dumps({**config, "base_model_name_or_path": str(base)}, indent=2).encode())


def adapter_bytes(adapter: Mapping[str, torch.Tensor]) -> int:
    """Size of one adapter in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter.values())


def _write(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(plain, metadata={"format": "pt"}))


@torch.no_grad()
def _draw(parameter: nn.Parameter, seed: int) -> None:
    """PEFT's initialisation of A with a separate generator, so that whole and partial models get the same values."""
    if parameter.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(parameter.shape, dtype=parameter.dtype)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    parameter.copy_(values)


def _adaptable(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    adaptable = _adaptable(model)
    for target in targets:
        if not any(_matches(name, [target]) for name in adaptable):
            last_parts = {name.rpartition(".")[2] for name in adaptable}
            raise BackboneError(
                f"adapter.target_modules: {target!r} matches no module of the backbone; "
                f"it has {', '.join(nearest_first(target.rpartition('.')[2], last_parts)[:8])}"
            )
