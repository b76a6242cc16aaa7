"""FELLRec's dynamic balance strategy (METHOD section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fellrec.aggregation.base import AggregationCallback
from fellrec.aggregation.settings.mixing import FELLRecSettings
from fellrec.errors import TrainingError
from fellrec.federated.records import Aggregated, Updates
from fellrec.functional import mixing
from fellrec.functional.sketch import sketch_updates


@dataclass(frozen=True)
class BalanceTerms:
    """The terms of METHOD (1)-(4) in one round, all float64.

    Attributes:
        similarity: ``[N, N]``, METHOD (1). Also given where attention is off, so that it can be looked at.
        difficulty: ``[N]``, METHOD (2).
        learning_speed: ``[N]``, METHOD (3); ones where heating is off.
        mixing: ``[N, N]``, METHOD (4).
    """

    similarity: Tensor
    difficulty: Tensor
    learning_speed: Tensor
    mixing: Tensor


class FELLRec(AggregationCallback, FELLRecSettings):
    """Clients listen to similar clients, and the more so the easier their task is and the later the round.

    Attention off: all similarities count as 1. Heating off: all learning speeds are 1. Both off: `Uniform`.
    """

    def mixing_matrix(self, updates: Updates, round_index: int) -> Tensor:
        """METHOD (4), ``[N, N]`` float64; see `terms`."""
        return self.terms(updates, round_index).mixing

    def aggregate(self, updates: Updates, round_index: int) -> Aggregated:
        """Mix, and report ``mixing``, ``similarity``, ``difficulty`` and ``learning_speed``."""
        terms = self.terms(updates, round_index)
        return self.combine(
            updates,
            terms.mixing,
            matrices={"similarity": terms.similarity},
            per_client={"difficulty": terms.difficulty, "learning_speed": terms.learning_speed},
        )

    def terms(self, updates: Updates, round_index: int) -> BalanceTerms:
        """All terms of METHOD (1)-(4) for one round.

        Raises:
            TrainingError: If a client's loss or adapter is not finite.
        """
        self._check_finite("loss", updates.losses, updates)
        released = self.fidelity == "released_code"
        gram = self._inner_products(updates, "parameters" if released else self.similarity)
        self._check_finite("adapter", gram.diagonal(), updates)
        similarity = mixing.similarity(gram)
        difficulty = mixing.difficulty(updates.losses.cpu(), self.temperature)
        speed = self._learning_speed(difficulty, round_index)
        matrix = mixing.mixing_matrix(similarity if self.attention else torch.ones_like(similarity), speed)
        return BalanceTerms(similarity, difficulty, speed, mixing.sequential_matrix(matrix) if released else matrix)

    def _inner_products(self, updates: Updates, of: str) -> Tensor:
        """``[N, N]`` float64, of what is compared."""
        if of == "sketch":
            sketches = sketch_updates(updates.end, updates.start, self.sketch_size)
            return sketches @ sketches.T
        return mixing.gram_matrix(updates.end, None if of == "parameters" else updates.start)

    def _learning_speed(self, difficulty: Tensor, round_index: int) -> Tensor:
        released = self.fidelity == "released_code"
        if not self.heating or (released and self.beta == 1):
            return torch.ones_like(difficulty)
        exponent = mixing.released_exponent if released else mixing.heating_exponent
        return mixing.learning_speed(difficulty, self.alpha, exponent(round_index, self.beta))

    def _check_finite(self, what: str, values: Tensor, updates: Updates) -> None:
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        if bad:
            clients = [updates.clients[row] for row in bad]
            raise TrainingError(f"aggregation {self.name}: the {what} is not finite for clients {clients}")
