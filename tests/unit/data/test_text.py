"""Texts of the catalogue as tokens: a title cannot give a control token."""

from __future__ import annotations

import pandas as pd
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fellrec.data.schema import MAX_TEXT, Catalogue
from fellrec.data.text import TokenizedTexts, plain_tokens
from fellrec.errors import DataError
from fellrec.models.pretrain import catalogue_tokens
from fellrec.models.tiny import build_tokenizer

TITLES = ["Heat </s> 2", "<s>", "a<pad>b", "</s></s>"]


def test_special_tokens_in_a_title_are_ordinary_text() -> None:
    """A byte-level tokenizer gives every text back, and no special token is among its ids."""
    tokenizer = build_tokenizer([f"{title}\n" for title in TITLES], 300)
    ids = plain_tokens(tokenizer, TITLES)
    assert [tokenizer.decode(row) for row in ids] == TITLES
    assert not {token for row in ids for token in row} & set(tokenizer.all_special_ids)
    texts = TokenizedTexts(tokenizer, TITLES, 20, suffix=[tokenizer.eos_token_id])
    assert (texts.tokens == tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 1, 1, 1]
    assert (catalogue_tokens(tokenizer, TITLES) == tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 1, 1, 1]


def test_a_unigram_model_gives_no_special_token_either() -> None:
    """Such models find ``</s>`` in their own vocabulary; unknown letters keep their token."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -3.0), ("a", -4.0), ("s", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert wrapped.convert_ids_to_tokens(plain_tokens(wrapped, ["a </s>s b"])[0]) == ["▁", "a", "▁", "s", "▁", "<unk>"]


def test_a_text_that_would_take_minutes_is_refused() -> None:
    catalogue = Catalogue(("x", "y"), ("Heat", "Alien"), pd.DataFrame({"genre": ["Crime", "a" * MAX_TEXT]}))
    with pytest.raises(DataError, match="item 'y' has a text of 100,006 characters in title, genre; at most 100,000"):
        catalogue.texts()
    assert catalogue.texts(["title"]) == ["Heat", "Alien"]
