"""Adapters, the parameters that are trained and exchanged: LoRA, or all parameters of a small backbone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftType, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils import CONFIG_NAME
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_NAME

from fellrec.functional.rng import derive_seed
from fellrec.models.architectures import ArchSpec
from fellrec.models.dropout import PackedDropout
from fellrec.models.modules import Targets, find_targets
from fellrec.models.peft_folder import ADAPTER_NAME, copy_into, read_adapter, save_lora, write_tensors
from fellrec.models.settings import FullSettings, LoraSettings, parts_of
from fellrec.state.files import write_atomically

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
    """Low-rank adapters of PEFT; the backbone is frozen, except modules that are trained as a whole."""

    def __post_init__(self) -> None:
        """Start without what depends on the model."""
        super().__post_init__()
        self._config: LoraConfig | None = None
        self._targets = Targets()

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model with trainable parameters."""
        return parts_of(self.layers)

    def attach(self, model: nn.Module, arch: ArchSpec, seed: int, part_of: PartOf) -> None:
        """Inject the adapter in float32, with an initialisation that depends on seed and name only.

        Raises:
            BackboneError: If a target matches no module; lists existing modules, closest names first. If ``path`` is
                not an adapter with the same rank and modules.
        """
        self._targets = find_targets(model, arch, self, part_of)
        model.requires_grad_(False)
        self._inject(model, arch, seed)
        for name in self._targets.saved:
            model.get_parameter(name).requires_grad_(True)
        if self.path is not None:
            self._start_from(self.path, model, part_of)

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The A and B matrices and the parameters of ``modules_to_save``, sorted by name."""
        found, saved = model.named_parameters(), self._targets.saved
        return dict(sorted((name, parameter) for name, parameter in found if "lora_" in name or name in saved))

    def save(self, adapter: Mapping[str, torch.Tensor], backbone: Any, frozen: Frozen, folder: Path) -> None:
        """Write in PEFT's format, for ``PeftModel.from_pretrained``."""
        assert self._config is not None, "attach comes before save"
        save_lora(adapter, self._config, self._targets, folder)

    def _inject(self, model: nn.Module, arch: ArchSpec, seed: int) -> None:
        self._config = LoraConfig(
            r=self.largest_rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self._targets.modules),
            task_type="CAUSAL_LM" if arch.is_causal else "FEATURE_EXTRACTION",
            base_model_name_or_path=getattr(model.config, "_name_or_path", None),
        )
        if not self._targets.names(model):
            return  # a partial model without any of these modules
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(self._config, model, adapter_name=ADAPTER_NAME)
        for module in model.modules():
            if isinstance(module, LoraLayer) and self.dropout:
                module.lora_dropout[ADAPTER_NAME] = PackedDropout(self.dropout)
        cast_adapter_dtype(model, ADAPTER_NAME)  # as PeftModel does: small steps would be lost in half precision
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_A" in name:
                _draw(parameter, derive_seed(seed, "lora", name))

    def _start_from(self, path: str, model: nn.Module, part_of: PartOf) -> None:
        """Give the adapter the values of another one; in a partial model, those of its parts."""
        expected = {
            "peft_type": PeftType.LORA,
            "r": self.largest_rank,
            "lora_alpha": self.alpha,
            "bias": "none",
            **dict.fromkeys(("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"), None),
        }
        tensors, parameters = read_adapter(path, expected), self.trainable(model)
        tied = {place for places in self._targets.saved.values() for place in places}
        here = {part_of(name) for name, _ in model.named_parameters()}
        surplus = [name for name in tensors if name not in parameters and name not in tied and part_of(name) in here]
        copy_into(path, tensors, parameters, sorted(surplus))


class FullAdapter(FullSettings):
    """Full fine-tuning: all parameters are trained and exchanged; for small backbones."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model with trainable parameters."""
        return parts_of(self.layers)

    def attach(self, model: nn.Module, arch: ArchSpec, seed: int, part_of: PartOf) -> None:
        """Make every parameter of the parts trainable, except those that the layers of all parts share."""
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) in self.parts and not name.startswith(arch.shared))

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
        write_tensors({**frozen(), **adapter}, folder / SAFE_WEIGHTS_NAME)


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
    write_tensors(weights, folder / SAFE_WEIGHTS_NAME)


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


def lora_layers(model: nn.Module) -> list[tuple[str, str, str, float, bool]]:
    """The layers of a model that LoRA adapts.

    Returns:
        For each: name of A, name of B, name of the frozen weight, α / rank, whether the frozen weight is ``[in, out]``.
    """
    return [
        (
            f"{name}.lora_A.{ADAPTER_NAME}.weight",
            f"{name}.lora_B.{ADAPTER_NAME}.weight",
            f"{name}.base_layer.weight",
            float(module.scaling[ADAPTER_NAME]),
            isinstance(module.get_base_layer(), Conv1D),
        )
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER_NAME in module.lora_A
    ]


def adapter_bytes(adapter: Mapping[str, torch.Tensor]) -> int:
    """Size of one adapter in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter.values())


@torch.no_grad()
def _draw(parameter: nn.Parameter, seed: int) -> None:
    """PEFT's initialisation of A with a separate generator, so that whole and partial models get the same values."""
    if parameter.device.type == "meta":
        return
    generator = torch.Generator().manual_seed(seed)
    values = torch.empty(parameter.shape, dtype=parameter.dtype)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    parameter.copy_(values)
