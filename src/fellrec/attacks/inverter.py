"""Trained inverters: from a hidden state back to its token, learned on public text through the public head.

Shape letters: B rows, L tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fellrec.attacks.public import Public

_LEARNING_RATE = 3e-3
_HEADS = (8, 4, 2, 1)
"""Attention heads of the transformer layer: the first number that divides the hidden size."""


class Inverter:
    """Guesses tokens by a network that was trained to give the tokens of public text from their hidden states.

    The text goes through the public head of the same depth; the network minimises the cross-entropy of its tokens with
    AdamW. Such inverters: Song, Raghunathan (2020), "Information Leakage in Embedding Models".

    Args:
        public: The public model, cut at the depth that is attacked, and the public texts.
        network: Makes a network from D and V: hidden states ``[B, L, D]`` to logits ``[B, L, V]``.
        steps: Of training, each with one of the public batches.
    """

    def __init__(self, public: Public, network: Callable[[int, int], nn.Module], steps: int) -> None:
        with torch.no_grad():
            hidden = [public.model.head(ids).float() for ids in public.texts]
        every = torch.cat([some[_is_token(ids)] for some, ids in zip(hidden, public.texts, strict=True)])
        self._mean, self._scale = every.mean(dim=0), every.std(dim=0).clamp_min(1e-6)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(public.seed)
            self._network = network(every.shape[1], public.model.num_embeddings).to(every.device)
        self._train(hidden, public.texts, steps)

    @torch.no_grad()
    def tokens(self, hidden_BLD: Tensor, num: int) -> Tensor:
        """See ``TokenAttack``."""
        rows = [self._logits(row[None])[0].topk(num, dim=-1).indices for row in hidden_BLD.float()]
        return torch.stack(rows)

    def _logits(self, hidden_BLD: Tensor) -> Tensor:
        logits: Tensor = self._network((hidden_BLD - self._mean) / self._scale)
        return logits

    def _train(self, hidden: list[Tensor], texts: list[Tensor], steps: int) -> None:
        optimizer = torch.optim.AdamW(self._network.parameters(), lr=_LEARNING_RATE)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
        with torch.enable_grad():
            for step in range(steps):
                ids = texts[step % len(texts)]
                inside = _is_token(ids)
                loss = F.cross_entropy(self._logits(hidden[step % len(texts)])[inside], ids[inside])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()


class CausalLayer(nn.Module):
    """One pre-norm transformer layer with causal attention, and a linear layer to the vocabulary.

    Causal, as the hidden states of a causal model are: what follows a position does not change it.
    """

    def __init__(self, hidden_size: int, num_tokens: int) -> None:
        super().__init__()
        heads = next(number for number in _HEADS if hidden_size % number == 0)
        self.layer = nn.TransformerEncoderLayer(
            hidden_size, heads, 2 * hidden_size, dropout=0.0, batch_first=True, norm_first=True
        )
        self.output = nn.Linear(hidden_size, num_tokens)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        """Logits ``[B, L, V]``."""
        mask = nn.Transformer.generate_square_subsequent_mask(hidden_BLD.shape[1], device=hidden_BLD.device)
        output: Tensor = self.output(self.layer(hidden_BLD, src_mask=mask, is_causal=True))
        return output


def _is_token(ids: Tensor) -> Tensor:
    """Where ids are not padding, ``[B, L]`` bool: an encoder's is negative, any other's a row's last zeros."""
    return (ids > 0).flip(1).cumsum(dim=1).flip(1) > 0
