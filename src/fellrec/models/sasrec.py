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

from fellrec.errors import DataError
from fellrec.functional.rng import derive_seed
from fellrec.models.architectures import arch_of
from fellrec.models.backbone import Backbone
from fellrec.models.settings import SasrecSettings

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


def sasrec_config(tokenizer: Any, settings: SasrecSettings) -> GPT2Config:
    """The shape of a SASRec backbone."""
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=settings.hidden_size,
        n_inner=settings.hidden_size,
        n_layer=settings.num_layers,
        n_head=settings.num_heads,
        n_positions=settings.max_position_embeddings,
        activation_function="relu",
        embd_pdrop=settings.dropout,
        attn_pdrop=settings.dropout,
        resid_pdrop=settings.dropout,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )


def build_sasrec(item_ids: Sequence[str], settings: SasrecSettings) -> Backbone:
    """A causal GPT-2 over items with random weights.

    Args:
        item_ids: The catalogue's.
        settings: Its shape, and the seed of its weights; the global generator is left alone.

    Raises:
        DataError: If an item id cannot be a token.
    """
    tokenizer = item_tokenizer(item_ids)
    config = sasrec_config(tokenizer, settings)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(settings.seed, "sasrec"))
        model = GPT2LMHeadModel(config)
    return Backbone(model, tokenizer, arch_of(config), "sasrec", is_pretrained=False)
