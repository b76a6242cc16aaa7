"""Two LoRA adapters in every layer, mixed by a router for every token: a client's own, and one that it receives."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F

from fellrec.functional.lora import initial_a
from fellrec.functional.names import last_part
from fellrec.models.adapters import Frozen, PartOf
from fellrec.models.architectures import ArchSpec
from fellrec.models.core_layer import sizes_of
from fellrec.models.dropout import PackedDropout
from fellrec.models.modules import Targets, find_targets, wrap
from fellrec.models.peft_folder import write_tensors
from fellrec.models.settings import LoraMixedSettings, parts_of
from fellrec.state.files import write_atomically

_NAMES = ("lora_own_a", "lora_own_b", "lora_rest_a", "lora_rest_b", "lora_router")


class MixedLoraLayer(nn.Module, BaseTunerLayer):
    """Adds ``s · (g₁ · B_own · A_own x + g₂ · B_rest · A_rest x)``, ``g = softmax(G x)``, to a frozen layer.

    Both B and the router G start as 0. All parameters of the adapter are float32.

    Args:
        base_layer: Linear, or GPT-2's Conv1D.
        name: Of the layer in the whole model.
        seed: Of both A.
        rank: Of both products.
        scale: s.
        dropout: On the input of both A, not of the router.
    """

    def __init__(self, base_layer: Any, name: str, *, seed: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        size_out, size_in = sizes_of(base_layer)
        self.base_layer = base_layer
        self.scale = scale
        self.dropout = PackedDropout(dropout) if dropout else nn.Identity()
        device = base_layer.weight.device
        own, rest = (initial_a((rank, size_in), seed, "lora", name, which).to(device) for which in ("own", "rest"))
        self.lora_own_a, self.lora_own_b = nn.Parameter(own), _zeros(size_out, rank, device)
        self.lora_rest_a, self.lora_rest_b = nn.Parameter(rest), _zeros(size_out, rank, device)
        self.lora_router = _zeros(2, size_in, device)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, plus that of the adapters unless they are switched off."""
        output: Tensor = self.base_layer(hidden, *args, **kwargs)
        if self.disable_adapters:
            return output
        hidden = hidden.to(self.lora_router.dtype)
        gates = F.linear(hidden, self.lora_router).softmax(dim=-1)
        hidden = self.dropout(hidden)
        own = F.linear(F.linear(hidden, self.lora_own_a), self.lora_own_b)
        rest = F.linear(F.linear(hidden, self.lora_rest_a), self.lora_rest_b)
        return (output + self.scale * (gates[..., :1] * own + gates[..., 1:] * rest)).to(output.dtype)


def _zeros(rows: int, columns: int, device: torch.device) -> nn.Parameter:
    return nn.Parameter(torch.zeros(rows, columns, device=device))


class LoraMixedAdapter(LoraMixedSettings):
    """A client's own LoRA and another one, mixed by a router for every token (FedALT)."""

    def __post_init__(self) -> None:
        """Start without what depends on the model."""
        super().__post_init__()
        self._targets = Targets()

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model with trainable parameters."""
        return parts_of(self.layers)

    def attach(self, model: nn.Module, arch: ArchSpec, seed: int, part_of: PartOf) -> None:
        """Put the adapter around the layers, with an initialisation that depends on seed and name only.

        Raises:
            BackboneError: If a target matches no module.
        """
        how: dict[str, Any] = {"rank": self.rank, "scale": self.alpha / self.rank, "dropout": self.dropout}
        self._targets = find_targets(model, arch, self, part_of)
        wrap(model, self._targets, lambda layer, name: MixedLoraLayer(layer, name, seed=seed, **how))

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Both pairs of factors, the routers, and the parameters of ``modules_to_save``, sorted by name."""
        saved = self._targets.saved
        return dict(sorted((n, p) for n, p in model.named_parameters() if last_part(n) in _NAMES or n in saved))

    def save(self, adapter: Mapping[str, Tensor], backbone: Any, frozen: Frozen, folder: Path) -> None:
        """Write tensors and settings as they are: no format of PEFT has weights that depend on the input."""
        folder.mkdir(parents=True, exist_ok=True)
        settings = {field.name: getattr(self, field.name) for field in fields(self)}
        write_atomically(folder / "lora_mixed.json", json.dumps(settings, indent=2, default=list).encode())
        write_tensors(adapter, folder / "lora_mixed.safetensors")
