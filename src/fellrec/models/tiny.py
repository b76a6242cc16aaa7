"""The tiny backbone: a small Llama with random weights, and a tokenizer trained on the catalogue's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fellrec.functional.rng import derive_seed
from fellrec.models.architectures import arch_of
from fellrec.models.backbone import Backbone
from fellrec.models.hf_folder import check_fits
from fellrec.models.settings import TinySettings

_SPECIAL = ("<pad>", "<s>", "</s>")


def build_tokenizer(texts: Sequence[str], vocab_size: int) -> Any:
    """Train a byte-level BPE tokenizer, which encodes any text without loss.

    Args:
        texts: Training texts.
        vocab_size: Maximum vocabulary size; small catalogues give smaller vocabularies.
    """
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


def tiny_config(tokenizer: Any, settings: TinySettings) -> LlamaConfig:
    """Configuration of a tiny backbone."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=8 * round(settings.hidden_size * 8 / 3 / 8),
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=settings.max_position_embeddings,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def build_tiny(texts: Sequence[str], settings: TinySettings) -> Backbone:
    """Build a small Llama with random weights and tied embeddings.

    Args:
        texts: Texts of the catalogue, for the tokenizer.
        settings: Sizes, and the seed of the weights; the global generator is not changed.

    Raises:
        BackboneError: If the memory is too small for these sizes.
    """
    tokenizer = build_tokenizer(texts, settings.vocab_size)
    config = tiny_config(tokenizer, settings)
    check_fits(config)
    with torch.random.fork_rng(devices=[]):
        # The weights are drawn on the CPU; torch.manual_seed would also reseed the accelerators.
        torch.default_generator.manual_seed(derive_seed(settings.seed, "tiny"))
        model = LlamaForCausalLM(config)
    return Backbone(model, tokenizer, arch_of(config), "tiny")
