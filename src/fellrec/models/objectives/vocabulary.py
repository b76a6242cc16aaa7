"""Every token that the texts of a run use must have an embedding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fellrec.errors import BackboneError


def check_tokens(tokenizer: Any, texts: Iterable[Tensor], num_embeddings: int) -> None:
    """Check the token ids of all texts before a model reads them.

    A tokenizer may be larger than the embedding, with tokens that no text has; tokens added later have no embedding.

    Args:
        tokenizer: The Hugging Face tokenizer that made the ids, for the message.
        texts: int64 ids of any shape.
        num_embeddings: Rows of the model's embedding.

    Raises:
        BackboneError: Naming the smallest id without an embedding, and its token.
    """
    beyond = torch.cat([ids[ids >= num_embeddings] for ids in texts])
    if len(beyond):
        token = int(beyond.min())
        raise BackboneError(
            f"the catalogue's texts use token {token} ({tokenizer.convert_ids_to_tokens(token)!r}), but the model has "
            f"embeddings for 0 to {num_embeddings - 1} only: give the tokenizer that belongs to the weights, or resize "
            "the model's embedding"
        )
