"""What is trained and travels: a LoRA adapter, or all parameters of a small backbone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import cast_adapter_dtype
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from fellrec.errors import BackboneError, ConfigError, nearest_first
from fellrec.functional.rng import derive_seed
from fellrec.models.architectures import ArchSpec

_NAME = "default"


class AdapterKind(Protocol):
    """What ``adapter=…`` provides."""

    def attach(self, model: nn.Module, arch: ArchSpec, seed: int) -> None:
        """Make the model's adapter trainable and everything else frozen, in place."""

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The adapter's parameters in the model, sorted by name."""

    def save(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Write the adapter that is in the model now, in a format that other tools read."""


class LoraAdapter:
    """Low-rank adapters through PEFT; the backbone is frozen.

    Args:
        rank: Rank r of the update B·A.
        alpha: The update is scaled by alpha / r.
        dropout: Dropout on the adapter's input, in [0, 1).
        target_modules: Name or names of the modules to adapt, matched at the end of their full names; ``None`` takes
            the architecture's own.

    Raises:
        ConfigError: If a number is out of range.
    """

    def __init__(
        self, rank: int = 8, alpha: int = 16, dropout: float = 0.05, target_modules: str | Sequence[str] | None = None
    ) -> None:
        if rank < 1:
            raise ConfigError(f"adapter.rank={rank} must be at least 1")
        if not 0 <= dropout < 1:
            raise ConfigError(f"adapter.dropout={dropout} must be in [0, 1)")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        names = [target_modules] if isinstance(target_modules, str) else target_modules
        self.target_modules = list(names) if names else None
        self._config: LoraConfig | None = None

    def attach(self, model: nn.Module, arch: ArchSpec, seed: int) -> None:
        """Inject the adapter in float32, with an initialisation that depends on the seed only.

        Raises:
            BackboneError: If a target matches no module; names some that exist, the nearest first.
        """
        targets = self.target_modules or list(arch.lora_targets)
        _check_targets(model, targets)
        self._config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
            base_model_name_or_path=getattr(model.config, "_name_or_path", None),
        )
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            # PEFT draws on the CPU; torch.manual_seed would reseed the accelerators too.
            torch.default_generator.manual_seed(derive_seed(seed, "lora"))
            inject_adapter_in_model(self._config, model, adapter_name=_NAME)
        cast_adapter_dtype(model, _NAME)  # as PeftModel does: half precision would lose small optimiser steps
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The A and B matrices, sorted by name."""
        return dict(sorted((name, parameter) for name, parameter in model.named_parameters() if "lora_" in name))

    def save(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Write PEFT's own format, which ``PeftModel.from_pretrained`` loads."""
        assert self._config is not None, "attach comes before save"
        folder.mkdir(parents=True, exist_ok=True)
        self._config.save_pretrained(str(folder))
        # PEFT's names are those of the wrapped model: base_model.model.<name>.
        tensors = get_peft_model_state_dict(model, adapter_name=_NAME)
        named = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(named, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


class FullAdapter:
    """All parameters of the backbone are trained and travel; for small backbones."""

    def attach(self, model: nn.Module, arch: ArchSpec, seed: int) -> None:
        """Make every parameter trainable."""
        for parameter in model.parameters():
            parameter.requires_grad_(True)

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters, sorted by name; shared ones once."""
        return dict(sorted(model.named_parameters()))

    def save(self, model: Any, tokenizer: Any, folder: Path) -> None:
        """Write a plain transformers folder, which ``AutoModelForCausalLM`` and ``AutoTokenizer`` load."""
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def adapter_bytes(adapter: Mapping[str, torch.Tensor]) -> int:
    """Bytes that travel one way when one client sends its adapter."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter.values())


def _check_targets(model: nn.Module, targets: Sequence[str]) -> None:
    adaptable = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in adaptable):
            last_parts = {name.rpartition(".")[2] for name in adaptable}
            raise BackboneError(
                f"adapter.target_modules: {target!r} matches no module of the backbone; "
                f"it has {', '.join(nearest_first(target.rpartition('.')[2], last_parts)[:8])}"
            )
