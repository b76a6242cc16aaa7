"""Adapters that train a small matrix between two frozen factors: LoRA-SB, and several heads of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from fellrec.functional.cores import CORES, SCALES, joined
from fellrec.models.adapters import Frozen, PartOf
from fellrec.models.architectures import ArchSpec
from fellrec.models.core_layer import CoreLayer, outer_factors, sizes_of
from fellrec.models.hf_folder import empty_model
from fellrec.models.modules import Targets, find_targets, wrap
from fellrec.models.peft_folder import ADAPTER_NAME, save_lora
from fellrec.models.settings import LoraHeadsSettings, LoraSBSettings, TargetSettings, parts_of


class CoreAdapter(TargetSettings):
    """What both have in common: layers, initialisation and export.

    Attributes:
        rank: Rank r of a head.
        alpha: The update is scaled by alpha / r.
        heads: Number of heads.
        has_scales: Whether each head has a trained factor.
    """

    rank: int
    alpha: int
    heads: int = 1
    has_scales: bool = False

    def __post_init__(self) -> None:
        """Start without what depends on the model."""
        super().__post_init__()
        self._targets = Targets()
        self._seed = 0
        self._is_causal = True

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of the model with trainable parameters."""
        return parts_of(self.layers)

    def attach(self, model: nn.Module, arch: ArchSpec, seed: int, part_of: PartOf) -> None:
        """Put the adapter around the layers, with an initialisation that depends on seed and name only.

        Raises:
            BackboneError: If a target matches no module, or a layer is smaller than the rank.
        """
        self._targets = find_targets(model, arch, self, part_of)
        self._seed, self._is_causal = seed, arch.is_causal
        how: dict[str, Any] = {"num_heads": self.heads, "rank": self.rank, "scale": self.alpha / self.rank}
        how |= {"dropout": self.dropout, "has_scales": self.has_scales}
        wrap(model, self._targets, lambda layer, name: CoreLayer(layer, name, seed=seed, **how))

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The small matrices, their factors, and the parameters of ``modules_to_save``, sorted by name."""
        saved = self._targets.saved
        found = {n: p for n, p in model.named_parameters() if n.endswith((f".{CORES}", f".{SCALES}")) or n in saved}
        return dict(sorted(found.items()))

    def save(self, adapter: Mapping[str, Tensor], backbone: Any, frozen: Frozen, folder: Path) -> None:
        """Write as a LoRA adapter of rank ``heads * rank`` in PEFT's format: A, and B times the small matrices."""
        layers = dict(empty_model("backbone", backbone.model.config).named_modules())
        found = {name: t for name, t in adapter.items() if not name.endswith((f".{CORES}", f".{SCALES}"))}
        for key in adapter:
            name, _, last = key.rpartition(".")
            if last == CORES:
                a, b = outer_factors(*sizes_of(layers[name]), name, self._seed, self.heads, self.rank)
                scales = adapter.get(f"{name}.{SCALES}")
                core = joined(adapter[key].cpu().double(), None if scales is None else scales.cpu().double())
                found[f"{name}.lora_A.{ADAPTER_NAME}.weight"] = a
                found[f"{name}.lora_B.{ADAPTER_NAME}.weight"] = (b.double() @ core).float()
        config = LoraConfig(
            r=self.heads * self.rank,
            lora_alpha=self.heads * self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self._targets.modules),
            task_type="CAUSAL_LM" if self._is_causal else "FEATURE_EXTRACTION",
            base_model_name_or_path=getattr(backbone.model.config, "_name_or_path", None),
        )
        save_lora(found, config, self._targets, folder)


class LoraSBAdapter(CoreAdapter, LoraSBSettings):
    """``s · B · R · A`` with a trained matrix R (LoRA-SB, Fed-SB)."""


class LoraHeadsAdapter(CoreAdapter, LoraHeadsSettings):
    """``s · Σ_i s_i · B_i · H_i · A_i`` with trained matrices H_i and factors s_i (RAVAN)."""

    has_scales = True

    @property
    def heads(self) -> int:  # type: ignore[override]
        """Number of heads."""
        return self.num_heads
