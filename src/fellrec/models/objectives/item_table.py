"""A cached table of item vectors, which is refreshed periodically."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fellrec.models.settings import EVERY_STEP, ROUND
from fellrec.models.split import SplitModel


class ItemTable:
    """The vectors of all items during a client's training, without gradients, as in RecFormer's two-stage training.

    The table belongs to one client's training in one round. It is computed from the adapter at the start of the round,
    and recomputed after a number of steps. It is not part of a checkpoint.

    Args:
        refresh: ``"every_step"`` for no table (vectors are computed in every step, with gradients), a number of
            optimiser steps, or ``"round"``.
        freeze_after: From this round on the table is computed once per round, independent of ``refresh``; ``None`` for
            never.
    """

    def __init__(self, refresh: str | int, freeze_after: int | None) -> None:
        self.refresh = refresh
        self.freeze_after = freeze_after

    @property
    def is_used(self) -> bool:
        """Whether there is a table in any round."""
        return self.refresh != EVERY_STEP or self.freeze_after is not None

    @property
    def is_always_used(self) -> bool:
        """Whether there is a table in every round."""
        return self.refresh != EVERY_STEP or self.freeze_after == 0

    def is_due(self, round_index: int, step: int) -> bool:
        """Whether the table is recomputed before a step; both count from 0, steps within the client's round.

        Example:
            >>> [ItemTable(2, None).is_due(0, step) for step in range(4)]
            [True, False, True, False]
            >>> [ItemTable("every_step", freeze_after=1).is_due(round_index, 0) for round_index in range(3)]
            [False, True, True]
        """
        if self.freeze_after is not None and round_index >= self.freeze_after:
            return step == 0
        if self.refresh == EVERY_STEP:
            return False
        return step == 0 if self.refresh == ROUND else step % int(self.refresh) == 0

    @torch.no_grad()
    def prepare(self, model: SplitModel, round_index: int, step: int, encode: Callable[[SplitModel], Tensor]) -> None:
        """Recompute the table if it is due.

        The model is in evaluation mode, and the client's random streams are not advanced.

        Args:
            model: The model with the client's adapter, inside ``model.streams.using``.
            round_index: Round, from 0.
            step: Optimiser step within the round, from 0.
            encode: Computes the vectors of all items.
        """
        if not self.is_due(round_index, step):
            return
        owner, was_training = model.streams.position, model.training
        model.eval()
        try:
            with model.streams.using(None):
                vectors_ID = encode(model)
        finally:
            model.train(was_training)
        if owner is not None:
            owner.tables[self] = vectors_ID

    def vectors(self, model: SplitModel) -> Tensor | None:
        """The table ``[I, D]`` of the client in training; ``None`` if it has none."""
        position = model.streams.position
        return None if position is None else position.tables.get(self)
