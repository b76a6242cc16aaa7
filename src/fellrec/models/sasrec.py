"""SASRec as a backbone (Kang, McAuley 2018): one token for each item, and a small causal GPT-2 with random weights.

With the retrieval objective on item ids (``objective=items``) an item's vector is its row of the embedding table, which
is the input's too, and the score of an item is its dot product with the last hidden state. What differs from the
original: the norm stands before each block on a residual path of its own (the original adds the normalised input, not
the raw one), the loss is cross-entropy over the whole catalogue (the original's is binary, against one sampled
negative), embeddings are not scaled by the square root of their size, and weights are drawn as GPT-2's are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import torch
from tokenizers import Tokenizer, models, normalizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fellrec.errors import ConfigError, DataError
from fellrec.functional.rng import derive_seed
from fellrec.models.architectures import arch_of
from fellrec.models.backbone import Backbone

_PAD = "<pad>"


def item_tokenizer(item_ids: Sequence[str]) -> Any:
    """A tokenizer that has one token for each item id, and reads nothing else; number 0 is padding.

    Args:
        item_ids: The catalogue's, of which no two are equal. Space around an id does not count.

    Raises:
        DataError: If an id cannot be a token of its own: it is another's with space around it, or holds the padding's.
    """
    names = pd.Series([name.strip() for name in item_ids], dtype=object)
    wrong = names.duplicated() | (names == "") | names.str.contains(_PAD, regex=False)
    if wrong.any():
        raise DataError(
            f"backbone=sasrec needs one token for each item; {int(wrong.sum())} item ids are no token of their own, "
            f"the first is {names[wrong].iloc[0]!r}"
        )
    numbers = {name: number for number, name in enumerate(names, start=1)}
    tokenizer = Tokenizer(models.WordLevel({_PAD: 0, **numbers}))  # without a token for what it does not know
    tokenizer.normalizer = normalizers.Strip()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, clean_up_tokenization_spaces=False)


def sasrec_config(
    tokenizer: Any, hidden_size: int, num_layers: int, num_heads: int, max_position_embeddings: int, dropout: float
) -> GPT2Config:
    """The shape of a SASRec backbone; see `build_sasrec`.

    Raises:
        ConfigError: If the sizes do not fit together.
    """
    if min(hidden_size, num_layers, num_heads) < 1 or hidden_size % num_heads:
        raise ConfigError(
            f"backbone.hidden_size={hidden_size} must be a multiple of backbone.num_heads={num_heads}, "
            f"and backbone.num_layers={num_layers} at least 1"
        )
    if max_position_embeddings < 1:
        raise ConfigError(f"backbone.max_position_embeddings={max_position_embeddings} must be at least 1")
    if not 0 <= dropout < 1:
        raise ConfigError(f"backbone.dropout={dropout} must be in [0, 1)")
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=hidden_size,
        n_inner=hidden_size,
        n_layer=num_layers,
        n_head=num_heads,
        n_positions=max_position_embeddings,
        activation_function="relu",
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )


def build_sasrec(
    item_ids: Sequence[str],
    hidden_size: int = 64,
    num_layers: int = 2,
    num_heads: int = 1,
    max_position_embeddings: int = 10,
    dropout: float = 0.2,
    seed: int = 0,
) -> Backbone:
    """A causal GPT-2 over items with random weights.

    Args:
        item_ids: The catalogue's.
        hidden_size: D, a multiple of ``num_heads``; the feed-forward layers have this size too.
        num_layers: Blocks.
        num_heads: Attention heads.
        max_position_embeddings: Longest history.
        dropout: Of embeddings, attention and blocks.
        seed: Of the weights; the global generator is left alone.

    Raises:
        ConfigError: If the sizes do not fit together.
        DataError: If an item id cannot be a token.
    """
    tokenizer = item_tokenizer(item_ids)
    config = sasrec_config(tokenizer, hidden_size, num_layers, num_heads, max_position_embeddings, dropout)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, "sasrec"))
        model = GPT2LMHeadModel(config)
    return Backbone(model, tokenizer, arch_of(config), "sasrec", is_pretrained=False)
