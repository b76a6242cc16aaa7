"""Nearest token embedding: each hidden state is compared with what every token gives before the first layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fellrec.attacks.attack import best_rows
from fellrec.attacks.public import Public


class NearestEmbedding:
    """Guesses the tokens whose public embeddings have the largest cosine similarity with a hidden state.

    At depth 0 the hidden state is the embedding, and all tokens are recovered; in deeper layers the residual stream
    still contains it. What a learned position embedding adds is subtracted.

    Args:
        public: The public model; it must have a cut at depth 0.
    """

    def __init__(self, public: Public) -> None:
        self._model = public.model
        with torch.no_grad(), public.model.at_depth(0):
            every = torch.arange(public.model.num_embeddings, device=_device(public))
            self._table = F.normalize(public.model.head(every[:, None])[:, 0].float(), dim=-1)

    @torch.no_grad()
    def tokens(self, hidden_BLD: Tensor, num: int) -> Tensor:
        """See ``TokenAttack``."""
        length = hidden_BLD.shape[1]
        with self._model.at_depth(0):
            same = torch.zeros(1, length, dtype=torch.long, device=hidden_BLD.device)
            repeated = self._model.head(same).float()
        queries = F.normalize(hidden_BLD.float() - (repeated - repeated[:, :1]), dim=-1)
        return best_rows(queries.flatten(0, 1), self._table, num).view(*hidden_BLD.shape[:2], num)


def _device(public: Public) -> torch.device:
    weight = public.model.model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    return weight.device
