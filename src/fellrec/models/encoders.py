"""Bidirectional encoders, whose parts must mask padding.

Padding has negative token ids, and its hidden states are zero at the output of every part. So body and tail derive the
mask from the hidden states, and no mask is transferred across a cut.

Shape letters: B rows, L tokens, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fellrec.models.architectures import ArchSpec, attention_window


class AlreadyEmbedded(nn.Module):
    """Identity that replaces the ``entry`` modules in body and tail."""

    def forward(self, hidden: Tensor | None = None, inputs_embeds: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        """Return the given ``[B, L, D]`` unchanged."""
        passed = hidden if inputs_embeds is None else inputs_embeds
        assert passed is not None
        return passed


def tokens_of(hidden_BLD: Tensor) -> Tensor:
    """Mask ``[B, L]`` bool of a hidden state, true for tokens, false for padding.

    Example:
        >>> tokens_of(torch.tensor([[[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]]]))
        tensor([[ True,  True, False]])
    """
    return (hidden_BLD.detach() != 0).any(dim=-1)


def run_encoder(inner: nn.Module, arch: ArchSpec, hidden_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Run an encoder or one of its parts.

    Args:
        inner: The model or part.
        arch: Its architecture.
        hidden_BLD: Token embeddings, or the hidden state of the previous part.
        mask_BL: 1 or true for tokens, 0 or false for padding.

    Returns:
        Hidden state ``[B, L, D]``, zero for padding.
    """
    length, arguments = hidden_BLD.shape[1], {}
    # Pad to the attention window here: Transformers would embed the padding again, which changes dropout.
    missing = -length % attention_window(inner.config)
    mask = F.pad(mask_BL.long(), (0, missing))
    if arch.has_global_token:
        arguments["global_attention_mask"] = (
            (torch.arange(len(mask[0]), device=mask.device) == 0).long().expand_as(mask)
        )
    output = inner(inputs_embeds=F.pad(hidden_BLD, (0, 0, 0, missing)), attention_mask=mask, **arguments)
    kept: Tensor = output.last_hidden_state[:, :length]
    return kept.masked_fill(~mask_BL.bool()[:, :, None], 0.0)
