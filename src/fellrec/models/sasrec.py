"""SASRec as a backbone (Kang, McAuley 2018): one token per item, and a small causal GPT-2 with random weights.

With the retrieval objective on item ids (``objective=items``), the vector of an item is its row of the input embedding,
and its score is the dot product with the last hidden state. Differences to the original: pre-norm blocks with the raw
input on the residual path (the original adds the normalised input), cross-entropy over the whole catalogue (binary
cross-entropy with one sampled negative), embeddings that are not scaled by the square root of their size, and GPT-2's
weight initialisation.
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
from fellrec.models.hf_folder import check_fits
from fellrec.models.settings import SasrecSettings

_PAD = "<pad>"


def item_tokenizer(item_ids: Sequence[str]) -> Any:
    """Build a tokenizer with one token per item id; token 0 is padding.

    Args:
        item_ids: Distinct item ids of the catalogue. Leading and trailing whitespace is ignored.

    Raises:
        DataError: If an id is empty, equals another id up to whitespace, or contains the padding token.
    """
    names = pd.Series([name.strip() for name in item_ids], dtype=object)
    wrong = names.duplicated() | (names == "") | names.str.contains(_PAD, regex=False)
    if wrong.any():
        raise DataError(
            f"backbone=sasrec needs distinct, non-empty item ids without {_PAD}; {int(wrong.sum())} ids are not valid, "
            f"first: {names[wrong].iloc[0]!r}"
        )
    numbers = {name: number for number, name in enumerate(names, start=1)}
    tokenizer = Tokenizer(models.WordLevel({_PAD: 0, **numbers}))  # without an unknown token
    tokenizer.normalizer = normalizers.Strip()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=_PAD, clean_up_tokenization_spaces=False)


def sasrec_config(tokenizer: Any, settings: SasrecSettings) -> GPT2Config:
    """Configuration of a SASRec backbone."""
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
    """Build a causal GPT-2 over items with random weights.

    Args:
        item_ids: Item ids of the catalogue.
        settings: Sizes, dropout, and the seed of the weights; the global generator is not changed.

    Raises:
        BackboneError: If the memory is too small for these sizes.
        DataError: If an item id is not a valid token.
    """
    tokenizer = item_tokenizer(item_ids)
    config = sasrec_config(tokenizer, settings)
    check_fits(config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(settings.seed, "sasrec"))
        model = GPT2LMHeadModel(config)
    return Backbone(model, tokenizer, arch_of(config), "sasrec", is_pretrained=False)
