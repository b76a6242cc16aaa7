"""The tiny backbone: a small Llama with random weights, and a tokenizer trained on the catalogue's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fellrec.errors import ConfigError
from fellrec.functional.rng import derive_seed
from fellrec.models.architectures import arch_of
from fellrec.models.backbone import Backbone

_SPECIAL = ("<pad>", "<s>", "</s>")
_SMALLEST_VOCABULARY = 256 + len(_SPECIAL)


def build_tokenizer(texts: Sequence[str], vocab_size: int = 4000) -> Any:
    """Train a byte-level BPE tokenizer, which encodes any text without loss.

    Args:
        texts: Training texts.
        vocab_size: Maximum vocabulary size; small catalogues give smaller vocabularies.

    Raises:
        ConfigError: If ``vocab_size`` is too small for all bytes and the special tokens.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ConfigError(
            f"backbone.vocab_size={vocab_size} must be at least {_SMALLEST_VOCABULARY}: "
            f"256 bytes and {len(_SPECIAL)} special tokens"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    pad, bos, eos = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


def tiny_config(
    tokenizer: Any, hidden_size: int, num_layers: int, num_heads: int, max_position_embeddings: int
) -> LlamaConfig:
    """Configuration of a tiny backbone; see `build_tiny`.

    Raises:
        ConfigError: If a size is out of range.
    """
    if min(hidden_size, num_layers, num_heads) < 1 or hidden_size % (2 * num_heads):
        raise ConfigError(
            f"backbone.hidden_size={hidden_size} must be a multiple of 2 · backbone.num_heads={num_heads}, "
            f"and backbone.num_layers={num_layers} at least 1"
        )
    if max_position_embeddings < 1:
        raise ConfigError(f"backbone.max_position_embeddings={max_position_embeddings} must be at least 1")
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=8 * round(hidden_size * 8 / 3 / 8),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_tiny(
    texts: Sequence[str],
    hidden_size: int = 64,
    num_layers: int = 4,
    num_heads: int = 2,
    vocab_size: int = 4000,
    max_position_embeddings: int = 512,
    seed: int = 0,
) -> Backbone:
    """Build a small Llama with random weights and tied embeddings.

    Args:
        texts: Texts of the catalogue, for the tokenizer.
        hidden_size: D, a multiple of ``2 · num_heads``.
        num_layers: Decoder layers.
        num_heads: Attention heads.
        vocab_size: Maximum vocabulary size.
        max_position_embeddings: Maximum sequence length in tokens.
        seed: Seed of the weights; the global generator is not changed.

    Raises:
        ConfigError: If a size is out of range.
    """
    tokenizer = build_tokenizer(texts, vocab_size)
    config = tiny_config(tokenizer, hidden_size, num_layers, num_heads, max_position_embeddings)
    with torch.random.fork_rng(devices=[]):
        # The weights are drawn on the CPU; torch.manual_seed would also reseed the accelerators.
        torch.default_generator.manual_seed(derive_seed(seed, "tiny"))
        model = LlamaForCausalLM(config)
    return Backbone(model, tokenizer, arch_of(config), "tiny")
