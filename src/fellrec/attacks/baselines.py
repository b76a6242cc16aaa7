"""What is known without an attack: chance, and the most popular tokens, titles and items."""

from __future__ import annotations

import torch
from torch import Tensor

from fellrec.attacks.observe import Observed
from fellrec.attacks.public import Public
from fellrec.attacks.targets import kind_of_target
from fellrec.attacks.titles import shared_ends, texts_of


class Chance:
    """Tokens and targets drawn by how frequent they are in the public data, all guesses independently."""

    def __init__(self, public: Public) -> None:
        self._public = public
        self._generator = public.generator()

    def tokens(self, observed: Observed, num: int) -> list[Tensor]:
        """Guesses ``[B, L, K]`` for each forward pass of a batch."""
        return [self._draw(self._public.token_counts, ids.numel(), num).view(*ids.shape, num) for ids in observed.ids]

    def targets(self, observed: Observed, num: int) -> Tensor:
        """See ``TargetAttack``."""
        return self._draw(_counts(self._public), len(observed.batch["targets"]), num)

    def _draw(self, counts: Tensor, positions: int, num: int) -> Tensor:
        drawn = torch.multinomial(counts, positions * num, replacement=True, generator=self._generator)
        return drawn.view(positions, num)


class MostPopular:
    """The most popular titles at the positions of titles, and the most frequent targets.

    Where titles begin and end is given, which an attacker would have to find out.
    """

    def __init__(self, public: Public) -> None:
        self._public = public

    def tokens(self, observed: Observed, num: int) -> list[Tensor]:
        """Guesses ``[B, L, K]`` for each forward pass: the k-th is the token of the k-th title at that place of it."""
        text = texts_of(self._public.objective)[0]
        before, _ = shared_ends(text)
        best = self._public.item_counts.topk(num).indices
        width = text.tokens.shape[1]
        frequent = self._public.token_counts.topk(num).indices
        guesses = []
        for ids, titles in zip(observed.ids, observed.titles, strict=True):
            is_same = titles[:, 1:] == titles[:, :-1]
            place = torch.zeros_like(ids)
            for column in range(1, ids.shape[1]):
                place[:, column] = torch.where(is_same[:, column - 1], place[:, column - 1] + 1, 0)
            place = (place.cpu() + before).clamp(max=width - 1)
            of_titles = text.tokens[best][:, place].movedim(0, -1)
            is_inside = text.inside[best][:, place].movedim(0, -1)
            guesses.append(torch.where(is_inside, of_titles, frequent).to(ids.device))
        return guesses

    def targets(self, observed: Observed, num: int) -> Tensor:
        """See ``TargetAttack``."""
        best = _counts(self._public).topk(num).indices
        return best.expand(len(observed.batch["targets"]), num)


def _counts(public: Public) -> Tensor:
    return public.item_counts if kind_of_target(public.objective) == "item" else public.token_counts
