"""The objective of a federation of data sets: that of each member, over the member's own catalogue."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fellrec.data.prepared import Places
from fellrec.models.module import DrawsForBatches, MeasuresHistories, Objective, PreparesSteps
from fellrec.models.split import SplitModel
from fellrec.models.streams import LayerStreams

_MEMBER = "member"
"""Entry of a batch ``[B, m]`` without elements: m is the member, which is so known without reading from a device."""


class MembersObjective:
    """Passes every batch to the objective of the member that its rows are of.

    Texts, tries, item vectors, the softmax and its samples are those of the member: exactly what a run on its data
    alone has. The items in its inputs are those of the joined catalogue.

    Args:
        objectives: One for each member, each built for its catalogue.
        places: Where the members are in the joined data.
    """

    def __init__(self, objectives: Sequence[Objective], places: Places) -> None:
        self.objectives = tuple(objectives)
        self.places = places
        self.one_target_per_row = objectives[0].one_target_per_row
        self.item_encoder = getattr(objectives[0], "item_encoder", "tokens")

    @property
    def metadata(self) -> dict[str, str]:
        """Those of all members, each value once, joined by ``+``."""
        found = [objective.metadata for objective in self.objectives]
        return {name: "+".join(dict.fromkeys(own[name] for own in found)) for name in found[0]}

    def of_client(self, client: int | None) -> Objective:
        """The objective of a client's own catalogue; this one for pooled data and public users."""
        return self if client is None or client < 0 else self.objectives[self.places.of_client(client)]

    def check(self, model: SplitModel) -> None:
        """Check the backbone for the texts of every member."""
        for objective in self.objectives:
            objective.check(model)

    def lengths(self, items: Tensor, is_target: Tensor) -> Tensor | None:
        """Tokens ``[B]`` of training rows, which may be of several members; ``None`` if they do not matter."""
        return self._by_member(items, lambda objective, own, rows: objective.lengths(own, is_target[rows]))

    def history_lengths(self, histories: Tensor) -> Tensor:
        """Tokens ``[B]`` of the inputs for histories ``[B, H]``, which may be of several members."""
        found = self._by_member(histories, lambda objective, own, rows: _history_lengths(objective, own))
        assert found is not None
        return found

    def collate(self, items: Tensor, is_target: Tensor) -> dict[str, Tensor]:
        """Turn training rows ``[B, W + 1]`` of one member into a batch."""
        member = self.places.of_batch(items)
        batch = self.objectives[member].collate(self.places.local(items, member), is_target)
        return {**batch, _MEMBER: torch.empty(len(items), member)}

    def draw(self, batch: dict[str, Tensor], streams: LayerStreams) -> dict[str, Tensor]:
        """Add what the member's objective draws for the batch, if anything."""
        objective = self._of(batch)
        return objective.draw(batch, streams) if isinstance(objective, DrawsForBatches) else batch

    def prepare_step(self, model: SplitModel, round_index: int, step: int) -> None:
        """Prepare the objectives of all members, for pooled data; see `of_client` for one of them."""
        for objective in self.objectives:
            if isinstance(objective, PreparesSteps):
                objective.prepare_step(model, round_index, step)

    def inputs(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Token ids of the batch's forward passes."""
        return self._of(batch).inputs(batch)

    def loss(self, model: SplitModel, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """Sum of the negative log-likelihood over the batch's targets, and their number."""
        return self._of(batch).loss(model, batch)

    def loss_of(self, model: SplitModel, hidden: list[Tensor], batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The loss from the final hidden states of ``inputs``."""
        return self._of(batch).loss_of(model, hidden, batch)

    def _of(self, batch: Mapping[str, Tensor]) -> Objective:
        return self.objectives[batch[_MEMBER].shape[1]]

    def _by_member(self, items: Tensor, measure: Callable[[Objective, Tensor, Tensor], Tensor | None]) -> Tensor | None:
        """What each member's objective measures of its rows, in the order of all rows; ``None`` if one has nothing."""
        member_of_row = self.places.of_items(items[:, 0])
        found = torch.zeros(len(items), dtype=torch.long)
        for member in member_of_row.unique().tolist():
            rows = (member_of_row == member).nonzero()[:, 0]
            own = measure(self.objectives[member], self.places.local(items[rows], member), rows)
            if own is None:
                return None
            found[rows] = own
        return found


def _history_lengths(objective: Objective, histories: Tensor) -> Tensor:
    return objective.history_lengths(histories) if isinstance(objective, MeasuresHistories) else _num_items(histories)


def _num_items(histories: Tensor) -> Tensor:
    return (histories >= 0).sum(dim=1)
