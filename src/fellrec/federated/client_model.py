"""The model with the parameters of one client in it: for training, and for ranking."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from torch import nn

from fellrec.federated.base_change import BaseWeights
from fellrec.federated.records import Job, ScoreJob
from fellrec.federated.slot import LocalSlot, Slot, second_slot
from fellrec.federated.slot_state import SlotState, new_parameters
from fellrec.federated.terms import LocalTerm, SecondModel
from fellrec.models.module import FellrecModule
from fellrec.models.parameter_swap import ParameterSwap
from fellrec.state.tensor_store import StoredTensors


class ClientModel(Protocol):
    """Puts clients' parameters into the model: all of them here, or head and tail here and the body on a server."""

    def training(self, job: Job, total_steps: int = 0) -> AbstractContextManager[Slot]:
        """While this lasts, the model computes with the job's adapter, and gradients end up in the slot.

        Args:
            job: What is trained.
            total_steps: Optimiser steps that are going to be taken, for local terms.
        """

    def evaluating(self, job: ScoreJob, stage: str, round_index: int) -> AbstractContextManager[None]:
        """While this lasts, the model computes with the job's adapter, without gradients."""

    def traffic(self, job: Job) -> tuple[tuple[Any, ...], ...]:
        """Rows of the ledger with what has crossed the cut in a job's training."""


class WholeClientModel:
    """Everything in this process; the parameters of a client replace those of the backbone, which is not copied.

    Args:
        module: The recommender.
        base: The frozen weights of its backbone; one for all runs with this backbone.
        terms: Local terms of the rule.
        second: The rule's second model, if it has one.
    """

    def __init__(
        self,
        module: FellrecModule,
        base: BaseWeights,
        terms: Sequence[LocalTerm] = (),
        second: SecondModel | None = None,
    ) -> None:
        self.module = module
        self.terms = terms
        self.second = second
        self._swap = ParameterSwap(module.model.model, module.trainable)
        self._base = base

    @contextmanager
    def training(self, job: Job, total_steps: int = 0) -> Iterator[LocalSlot]:
        """See ``ClientModel``."""
        self.use_base(job.base)
        with self.slot(SlotState.of(job, total_steps)) as slot:
            yield slot

    @contextmanager
    def evaluating(self, job: ScoreJob, stage: str, round_index: int) -> Iterator[None]:
        """See ``ClientModel``."""
        self.use_base(job.base)
        with self.holding(SlotState(job.adapter.tensors(), trains=())):
            yield

    def traffic(self, job: Job) -> tuple[tuple[Any, ...], ...]:
        """Nothing."""
        return ()

    def use_base(self, changes: tuple[StoredTensors, ...]) -> None:
        """Bring the frozen weights to the version that these changes make."""
        self._base.use(changes)

    @contextmanager
    def slot(self, begin: SlotState, names: Collection[str] | None = None) -> Iterator[LocalSlot]:
        """A slot for the parameters that are in this process, or for those ``names`` of them."""
        with self.holding(begin, names) as parameters:
            has_trained = any(parameter.requires_grad for parameter in parameters.values())
            optimizer = self.module.configure_optimizers() if has_trained else None
            second = second_slot(
                self.second, begin, parameters, lambda _: self.module.configure_optimizers(), self._swap.using
            )
            yield LocalSlot(parameters, begin, optimizer, self.terms, second)

    @contextmanager
    def holding(self, begin: SlotState, names: Collection[str] | None = None) -> Iterator[dict[str, nn.Parameter]]:
        """While this lasts, new parameters, or those ``names`` of them, have these values in the model; gives them."""
        trainable = self.module.trainable
        own = trainable if names is None else {name: trainable[name] for name in names}
        parameters = new_parameters(own, begin)
        with self._swap.using(parameters):
            yield parameters
