"""Logit lens: the final norm and the LM head read a hidden state as if it were the last layer's."""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.attacks.public import Public
from fellrec.errors import ConfigError


class LogitLens:
    """Guesses the tokens with the largest logits of the public norm and LM head (nostalgebraist 2020).

    Args:
        public: The public model.

    Raises:
        ConfigError: If the model has no LM head or no final norm, as encoders.
    """

    def __init__(self, public: Public) -> None:
        model = public.model
        if not model.arch.is_causal or model.arch.norm is None or model.missing_head:
            raise ConfigError(
                "attack=logit_lens needs a backbone with a final norm and an LM head; leave it out for encoders"
            )
        self._model = model
        self._norm = model.arch.inner_of(model.model).get_submodule(model.arch.norm)

    @torch.no_grad()
    def tokens(self, hidden_BLD: Tensor, num: int) -> Tensor:
        """See ``TokenAttack``."""
        rows = [self._model.lm_head(self._norm(row)).float().topk(num, dim=-1).indices for row in hidden_BLD]
        return torch.stack(rows)
