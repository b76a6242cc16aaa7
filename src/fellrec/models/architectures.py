"""What differs between architectures, as data: where the parts of a Hugging Face causal LM are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from fellrec.errors import BackboneError, unknown


@dataclass(frozen=True)
class ArchSpec:
    """Names of the parts of one architecture; attribute names are relative to the inner model.

    Attributes:
        inner: Attribute of the causal LM that holds the decoder.
        embedding: Token embedding.
        layers: List of decoder layers.
        norm: Final norm.
        entry: Modules that act on the embedding before the first layer, and must not act again in body and tail.
        position_embedding: Learned position embedding that ``forward`` adds, ``None`` for rotary ones.
        lora_targets: Modules that LoRA adapts by default.
        names_in_files: Parameters that checkpoint files call by an older name: the model's name, the file's.
    """

    inner: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    norm: str = "norm"
    entry: tuple[str, ...] = ()
    position_embedding: str | None = None
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    names_in_files: tuple[tuple[str, str], ...] = ()


_LLAMA = ArchSpec()
ARCHITECTURES: dict[str, ArchSpec] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "gpt2": ArchSpec(
        inner="transformer",
        embedding="wte",
        layers="h",
        norm="ln_f",
        entry=("drop",),
        position_embedding="wpe",
        lora_targets=("c_attn",),
    ),
    "gpt_neox": ArchSpec(
        inner="gpt_neox",
        embedding="embed_in",
        norm="final_layer_norm",
        entry=("emb_dropout",),
        lora_targets=("query_key_value",),
        names_in_files=(("lm_head.weight", "embed_out.weight"),),
    ),
}


def arch_of(config: Any) -> ArchSpec:
    """The architecture of a Hugging Face configuration.

    Raises:
        BackboneError: If ``config.model_type`` is not known; names the known ones.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise BackboneError(unknown("architecture (model_type)", config.model_type, ARCHITECTURES))
    return found


def decoder_layers(model: nn.Module, arch: ArchSpec) -> nn.ModuleList:
    """The decoder layers of a whole causal LM."""
    layers = getattr(getattr(model, arch.inner), arch.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers
