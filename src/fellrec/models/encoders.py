"""Bidirectional encoders: every part must know where padding is, or tokens would see it.

Token ids of padding are negative, and a hidden state of padding is zero wherever it leaves a part. So padding needs no
message of its own to cross a cut, and a hidden state is all that body and tail need, as for causal LMs.

Shape letters: B rows, L tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fellrec.models.architectures import ArchSpec, attention_window


class AlreadyEmbedded(nn.Module):
    """Stands for what acts on the embedding, in parts where it has acted: passes a hidden state."""

    def forward(self, hidden: Tensor | None = None, *, inputs_embeds: Tensor | None = None, **_: Any) -> Tensor:
        """``[B, L, D]`` unchanged, given in either way."""
        passed = hidden if inputs_embeds is None else inputs_embeds
        assert passed is not None
        return passed


def tokens_of(hidden_BLD: Tensor) -> Tensor:
    """Which places of a hidden state hold a token, ``[B, L]`` bool.

    Example:
        >>> tokens_of(torch.tensor([[[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]]]))
        tensor([[ True,  True, False]])
    """
    return (hidden_BLD.detach() != 0).any(dim=-1)


def run_encoder(inner: nn.Module, arch: ArchSpec, hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Run some layers of an encoder.

    Args:
        inner: The model, or a part of it.
        arch: Its architecture.
        hidden_BLD: Token embeddings, or a hidden state.
        mask_BL: 1 or true for tokens.

    Returns:
        Hidden state ``[B, L, D]``, zero for padding.
    """
    length, arguments = hidden_BLD.shape[1], {}
    # Transformers would do this, and pass what is padded through the embeddings twice, with other dropout.
    missing = -length % attention_window(inner.config)
    mask = F.pad(mask_BL.long(), (0, missing))
    if arch.has_global_token:
        arguments["global_attention_mask"] = (
            (torch.arange(len(mask[0]), device=mask.device) == 0).long().expand_as(mask)
        )
    output = inner(inputs_embeds=F.pad(hidden_BLD, (0, 0, 0, missing)), attention_mask=mask, **arguments)
    kept: Tensor = output.last_hidden_state[:, :length]
    return kept.masked_fill(~mask_BL.bool()[:, :, None], 0.0)
