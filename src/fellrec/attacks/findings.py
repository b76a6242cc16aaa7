"""What an attack has found: figures by attack and depth, and how they are computed from guesses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fellrec.attacks.observe import Observed
from fellrec.attacks.targets import true_targets
from fellrec.functional.recovery import all_of_each, is_among_first, rouge_l
from fellrec.models.module import Objective


@dataclass(frozen=True)
class Finding:
    """The figures of one attack in one setting.

    Attributes:
        attack: Its name, or that of a baseline.
        metrics: Name → value in [0, 1], such as ``token_at_1``.
        depth: Layers of the head; ``None`` if it does not matter.
        users_per_client: Of attacks on updates; ``None`` for others.
    """

    attack: str
    metrics: Mapping[str, float]
    depth: int | None = None
    users_per_client: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "attack": self.attack,
            "depth": self.depth,
            "users_per_client": self.users_per_client,
            "metrics": dict(self.metrics),
        }


def token_metrics(
    guesses: Sequence[Sequence[Tensor]], observed: Sequence[Observed], tokenizer: Any, num: int
) -> dict[str, float]:
    """Recovery of the titles in the inputs of some batches.

    Args:
        guesses: For each batch, ``[B, L, K]`` for each forward pass.
        observed: The batches.
        tokenizer: Of the backbone, for texts.
        num: K.

    Returns:
        ``token_at_1``, ``token_at_K``: fraction of the tokens of titles that are the first guess, or among the first K;
        ``title_at_1``, ``title_at_K``: fraction of titles of which all tokens are; ``rouge_l``: mean over rows, of the
        text of the titles. Empty without titles.
    """
    right: dict[int, list[Tensor]] = {1: [], num: []}
    whole: dict[int, list[Tensor]] = {1: [], num: []}
    texts = []
    for own, batch in zip(guesses, observed, strict=True):
        for guess_BLK, ids_BL, titles_BL in zip(own, batch.ids, batch.titles, strict=True):
            inside = titles_BL >= 0
            for cutoff, parts in right.items():
                is_right = is_among_first(guess_BLK[inside], ids_BL[inside], cutoff)
                parts.append(is_right)
                whole[cutoff].append(all_of_each(is_right, titles_BL[inside]))
            rows = zip(guess_BLK[:, :, 0], ids_BL, inside, strict=True)
            texts += [rouge_l(tokenizer.decode(guess[at]), tokenizer.decode(true[at])) for guess, true, at in rows]
    if not sum(map(len, right[1])):
        return {}
    found = {f"token_at_{cutoff}": mean_of(parts) for cutoff, parts in right.items()}
    found |= {f"title_at_{cutoff}": mean_of(parts) for cutoff, parts in whole.items()}
    return {**found, "rouge_l": sum(texts) / len(texts)}


def target_metrics(
    guesses: Sequence[Tensor], observed: Sequence[Observed], objective: Objective, num: int
) -> dict[str, float]:
    """Recovery of the targets of some batches: ``target_at_1`` and ``target_at_K``.

    Args:
        guesses: For each batch, ``[T, K]``.
        observed: The batches.
        objective: Knows the targets.
        num: K.
    """
    truths = [true_targets(objective, batch.batch) for batch in observed]
    return {
        f"target_at_{cutoff}": mean_of(
            [is_among_first(guess, truth, cutoff) for guess, truth in zip(guesses, truths, strict=True)]
        )
        for cutoff in (1, num)
    }


def mean_of(parts: Sequence[Tensor]) -> float:
    """The mean of the values of several tensors together."""
    return float(torch.cat([part.double() for part in parts]).mean())
