"""Specifications of the supported Hugging Face architectures: names and properties of their modules."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from fellrec.errors import BackboneError, unknown
from fellrec.models.settings import MAX_LAYERS


@dataclass(frozen=True)
class ArchSpec:
    """Modules and properties of one architecture; attribute names are relative to the inner model.

    Attributes:
        inner: Dotted name of the decoder in the causal LM; empty for an encoder, which is the inner model.
        embedding: Token embedding, or the module that contains it.
        layers: List of decoder or encoder layers, as a dotted name.
        norm: Final norm; ``None`` if each layer ends with a norm.
        entry: Modules between embedding and first layer, which must not be applied again in body and tail.
        position_embedding: Learned position embedding that ``forward`` adds; ``None`` if there is none.
        lora_targets: Modules that LoRA adapts by default.
        names_in_files: Parameters with an older name in checkpoint files: (name in the model, name in the file).
        prefix_in_files: Prefix of an encoder's parameters in checkpoint files of a model with a head.
        is_causal: Whether attention is causal; else the model is a bidirectional encoder.
        counts_from_padding: Whether position ids start at ``pad_token_id + 1``.
        has_global_token: Whether attention is local and the first token needs global attention.
        has_pooler: Whether the class has a pooler, which is not built.
        shared: Dotted names of modules with parameters that the layers of all parts use; both sides of a cut have them.
    """

    inner: str = "model"
    embedding: str = "embed_tokens"
    layers: str = "layers"
    norm: str | None = "norm"
    entry: tuple[str, ...] = ()
    position_embedding: str | None = None
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    names_in_files: tuple[tuple[str, str], ...] = ()
    prefix_in_files: str = ""
    is_causal: bool = True
    counts_from_padding: bool = False
    has_global_token: bool = False
    has_pooler: bool = False
    shared: tuple[str, ...] = ()

    @property
    def names_prefix(self) -> str:
        """Prefix of the inner model's parameter names in the whole model."""
        return f"{self.inner}." if self.inner else ""

    def inner_of(self, model: Any) -> Any:
        """The inner model of a whole model."""
        return model.get_submodule(self.inner)


_LLAMA = ArchSpec()
_BERT = ArchSpec(
    inner="",
    embedding="embeddings",
    layers="encoder.layer",
    norm=None,
    entry=("embeddings",),
    lora_targets=("query", "value"),
    prefix_in_files="bert.",
    is_causal=False,
    has_pooler=True,
)
_ROBERTA = replace(_BERT, prefix_in_files="roberta.", counts_from_padding=True)
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
    "opt": ArchSpec(inner="model.decoder", norm="final_layer_norm", position_embedding="embed_positions"),
    "phi3": ArchSpec(lora_targets=("qkv_proj",)),
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": replace(
        _BERT,
        layers="transformer.layer",
        lora_targets=("q_lin", "v_lin"),
        prefix_in_files="distilbert.",
        has_pooler=False,
    ),
    "mpnet": replace(
        _BERT,
        lora_targets=("q", "v"),
        prefix_in_files="mpnet.",
        counts_from_padding=True,
        shared=("encoder.relative_attention_bias",),
    ),
    "modernbert": ArchSpec(
        inner="",
        embedding="embeddings",
        norm="final_norm",
        entry=("embeddings",),
        lora_targets=("Wqkv",),
        prefix_in_files="model.",
        is_causal=False,
    ),
    "longformer": replace(
        _ROBERTA,
        prefix_in_files="longformer.",
        lora_targets=("query", "value", "query_global", "value_global"),  # the latter project the first token
        has_global_token=True,
    ),
}


def arch_of(config: Any) -> ArchSpec:
    """The architecture of a Hugging Face configuration.

    Raises:
        BackboneError: If ``config.model_type`` is unknown (lists the known ones) or an encoder-decoder, or an encoder
            is configured as a decoder.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise BackboneError(
            f"model_type {config.model_type} is an encoder-decoder, which is not supported; use a causal LM, or an "
            f"encoder with objective=retrieval: {', '.join(sorted(ARCHITECTURES))}"
        )
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise BackboneError(unknown("architecture (model_type)", config.model_type, ARCHITECTURES))
    if not found.is_causal and getattr(config, "is_decoder", False):
        raise BackboneError(f"model_type {config.model_type} with is_decoder=true is not supported; set it to false")
    return found


def check_config(given: str, config: Any) -> None:
    """Refuse a configuration that is not supported, before a model of it is built.

    Args:
        given: The setting that names it, such as ``backbone.path=…``.
        config: The Hugging Face configuration.

    Raises:
        BackboneError: Naming the field of ``config.json``, its value and what is allowed.
    """
    arch_of(config)
    layers = config.num_hidden_layers
    if not isinstance(layers, int) or not 1 <= layers <= MAX_LAYERS:
        raise BackboneError(
            f"{given}: num_hidden_layers={layers} in config.json is not allowed: a whole number from 1 to {MAX_LAYERS}"
        )
    for field, needed in _needed(config).items():
        if getattr(config, field) != needed:
            raise BackboneError(
                f"{given}: {field}={getattr(config, field)} in config.json is not supported with model_type "
                f"{config.model_type}: {needed}"
            )


def _needed(config: Any) -> dict[str, Any]:
    """Values that fields must have: else a model cannot be cut, draws numbers beside its layers, or reads wrongly."""
    if config.model_type == "opt":
        return {"word_embed_proj_dim": config.hidden_size, "layerdrop": 0.0}
    return {"pad_token_id": 1} if config.model_type == "mpnet" else {}  # MPNet's positions start after 1 in any case


def decoder_layers(model: nn.Module, arch: ArchSpec) -> nn.ModuleList:
    """The layers of a whole causal LM or encoder."""
    layers = arch.inner_of(model).get_submodule(arch.layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def auto_class(arch: ArchSpec) -> tuple[Any, dict[str, Any]]:
    """The Transformers auto class of an architecture, and its keyword arguments; encoders have no pooler."""
    arguments = {"add_pooling_layer": False} if arch.has_pooler else {}
    return AutoModelForCausalLM if arch.is_causal else AutoModel, arguments


def model_of(config: Any, dtype: torch.dtype | None = None) -> Any:
    """Build a model of a configuration with random weights.

    Raises:
        BackboneError: If the architecture is unknown.
    """
    maker, arguments = auto_class(arch_of(config))
    return maker.from_config(config, dtype=dtype, **arguments)


def attention_window(config: Any) -> int:
    """The number that the sequence length must be a multiple of inside the model; 1 for most models.

    Example:
        >>> from transformers import BertConfig, LongformerConfig
        >>> attention_window(LongformerConfig(attention_window=[64, 128])), attention_window(BertConfig())
        (128, 1)
    """
    window = getattr(config, "attention_window", 1)
    return int(window if isinstance(window, int) else max(window))


def context_of(config: Any) -> int | None:
    """Maximum sequence length in tokens; ``None`` if unlimited.

    Example:
        >>> from transformers import LongformerConfig, RobertaConfig
        >>> context_of(RobertaConfig(max_position_embeddings=514, pad_token_id=1))
        512
        >>> context_of(LongformerConfig(max_position_embeddings=4098, attention_window=512, pad_token_id=1))
        4096
    """
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return None
    first = config.pad_token_id + 1 if arch_of(config).counts_from_padding else 0
    return int(positions) - first - (int(positions) - first) % attention_window(config)
