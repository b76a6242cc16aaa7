"""What a batch predicts: items with a retrieval objective, tokens of titles with a generative one.

Shape letters: B rows, L tokens, D hidden size, T targets, C choices: items or tokens.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fellrec.attacks.observe import Observed
from fellrec.attacks.public import Public
from fellrec.errors import ConfigError
from fellrec.models.module import Objective
from fellrec.models.objectives.generative import GenerativeObjective
from fellrec.models.objectives.retrieval import RetrievalObjective
from fellrec.models.split import SplitModel


def kind_of_target(objective: Objective) -> Literal["item", "token"]:
    """What an objective's targets are.

    Raises:
        ConfigError: If it is neither of fellrec's.
    """
    if isinstance(objective, RetrievalObjective):
        return "item"
    if isinstance(objective, GenerativeObjective):
        return "token"
    raise ConfigError(f"attacks know the objectives retrieval, items and generative, not {type(objective).__name__}")


def true_targets(objective: Objective, batch: dict[str, Tensor]) -> Tensor:
    """The targets of a batch, ``[T]`` int64."""
    if kind_of_target(objective) == "item":
        return batch["targets"]
    return batch["input_ids"][batch["rows"], batch["columns"] + 1]


def target_scores(
    objective: Objective, model: SplitModel, final: list[Tensor], batch: dict[str, Tensor], items_CD: Tensor | None
) -> Tensor:
    """Logits of all choices at the places of a batch's targets, ``[T, C]`` float32, differentiable.

    Args:
        objective: Of the batch.
        model: Has the LM head.
        final: ``[B, L, D]`` final hidden states.
        batch: Only where its targets are is used, not what they are.
        items_CD: From `choices`.
    """
    if isinstance(objective, RetrievalObjective):
        assert items_CD is not None
        return objective.queries_of(final, batch) / objective.temperature @ items_CD.T
    return model.lm_head(final[0][batch["rows"], batch["columns"]]).float()


def choices(objective: Objective, model: SplitModel) -> Tensor | None:
    """Vectors of all items ``[C, D]`` by which the model scores them; ``None`` for tokens, which the LM head scores."""
    return objective.item_vectors(model) if isinstance(objective, RetrievalObjective) else None


class PublicTail:
    """Reads the targets off the hidden states of the second cut with the public copy of the tail and of the LM head.

    The server has these hidden states: it has computed them. The client's own tail differs from the public one by what
    was trained.

    Args:
        public: The public model.
    """

    def __init__(self, public: Public) -> None:
        self._public = public
        with torch.no_grad():
            self._items = choices(public.objective, public.model)

    @torch.no_grad()
    def targets(self, observed: Observed, num: int) -> Tensor:
        """See ``TargetAttack``."""
        model = self._public.model
        final = [model.tail(hidden_BLD) for hidden_BLD in observed.second]
        scores = target_scores(self._public.objective, model, final, observed.batch, self._items)
        return scores.topk(num, dim=1).indices
