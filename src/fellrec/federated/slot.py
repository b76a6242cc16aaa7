"""One side's part of one client's parameters while the client is trained: values, gradients, optimiser."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fellrec.errors import TrainingError
from fellrec.federated.records import Job
from fellrec.federated.terms import LocalTerm, TermContext
from fellrec.types import Adapter


@dataclass(frozen=True)
class SlotState:
    """What a slot begins with and ends with.

    Attributes:
        adapter: By parameter.
        optimizer: Optimiser state by ``parameter|key``.
        anchors: Other adapters by ``name|parameter``.
        tensors: Tensors of the client by ``name|parameter``.
        trains: Parameters that are trained; ``None`` for all.
        total_steps: Optimiser steps that the round is going to take; 0 if it is not known.
    """

    adapter: Adapter
    optimizer: Adapter = field(default_factory=dict)
    anchors: Adapter = field(default_factory=dict)
    tensors: Adapter = field(default_factory=dict)
    trains: tuple[str, ...] | None = None
    total_steps: int = 0

    @classmethod
    def of(cls, job: Job, total_steps: int = 0) -> SlotState:
        """What a job begins with."""
        anchors = {f"{name}|{key}": t for name, stored in job.anchors.items() for key, t in stored.tensors().items()}
        return cls(
            job.adapter.tensors(), job.optimizer.tensors(), anchors, job.tensors.tensors(), job.trains, total_steps
        )

    def part(self, names: Sequence[str]) -> SlotState:
        """The part of one side, which has the parameters ``names``."""
        wanted = set(names)

        def second(tensors: Adapter) -> dict[str, Tensor]:
            return {key: tensor for key, tensor in tensors.items() if key.partition("|")[2] in wanted}

        return SlotState(
            adapter={name: self.adapter[name] for name in names},
            optimizer={key: t for key, t in self.optimizer.items() if key.partition("|")[0] in wanted},
            anchors=second(self.anchors),
            tensors=second(self.tensors),
            trains=None if self.trains is None else tuple(name for name in self.trains if name in wanted),
            total_steps=self.total_steps,
        )

    def joined(self, other: SlotState) -> SlotState:
        """Both sides' parts together, parameters in order of their names."""
        adapter = {**self.adapter, **other.adapter}
        return SlotState(
            {name: adapter[name] for name in sorted(adapter)},
            {**self.optimizer, **other.optimizer},
            {**self.anchors, **other.anchors},
            {**self.tensors, **other.tensors},
            self.trains,
            self.total_steps,
        )


class Slot(Protocol):
    """Where the gradients of a client's local step end up; in this process, or on both sides of a cut."""

    def before_backward(self, wants_norms: bool, learning_rate: float) -> None:
        """Called before every backward pass.

        Args:
            wants_norms: Whether `norms` is called after it.
            learning_rate: Of the optimiser step that follows.
        """

    def norms(self) -> dict[str, float]:
        """Norm of each parameter's gradient in this step, local terms included; without those that have none."""

    def step(self, clip_factor: float, learning_rate: float) -> None:
        """Scale the gradients, take the optimiser step, and clear the gradients."""

    def state(self) -> SlotState:
        """Adapter, optimiser state and tensors as they are now, copied to the CPU."""


class LocalSlot:
    """The parameters of one client, with an optimiser of their own, in this process.

    Args:
        parameters: The client's own parameters, by name; see ``new_parameters``.
        begin: What the slot begins with.
        optimizer: Over those of the parameters that are trained; ``None`` if there are none.
        terms: Local terms of the rule.

    Attributes:
        scaler: Of the loss, whose gradients are divided by its scale again; ``None`` if the loss is not scaled. A step
            with a gradient that is not finite is left out.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        begin: SlotState,
        optimizer: torch.optim.Optimizer | None,
        terms: Sequence[LocalTerm] = (),
    ) -> None:
        self.parameters = parameters
        self.terms = terms
        self.scaler: GradScaler | None = None
        self._trained = {name: p for name, p in parameters.items() if p.requires_grad}
        self._begin = begin
        self._optimizer = optimizer
        self._has_corrected = False
        if optimizer is not None:
            load_optimizer(optimizer, self._trained, begin.optimizer)
        self._context = self._new_context() if terms else TermContext({})

    def before_backward(self, wants_norms: bool, learning_rate: float) -> None:
        """See ``Slot``; local terms are told the learning rate before they change the gradients."""
        self._context.learning_rate = learning_rate

    def norms(self) -> dict[str, float]:
        """See ``Slot``."""
        self._correct()
        gradients = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        if not gradients:
            return {}
        found = torch.stack([torch.linalg.vector_norm(gradient).float() for gradient in gradients.values()])
        return dict(zip(gradients, found.tolist(), strict=True))

    def step(self, clip_factor: float, learning_rate: float) -> None:
        """See ``Slot``."""
        if self._optimizer is None:
            return
        self._context.learning_rate = learning_rate
        self._correct()
        if clip_factor != 1.0:
            for parameter in self._trained.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(torch.tensor(clip_factor, dtype=torch.float32).to(parameter.grad.device))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if self.scaler is None:
            self._optimizer.step()
        else:
            self.scaler.step(self._optimizer)
            self.scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._has_corrected = False
        self._context.num_steps += 1

    def state(self) -> SlotState:
        """See ``Slot``; the optimiser state of parameters that were not trained is that of the beginning."""
        tensors = dict(self._begin.tensors)
        for term in self.terms:
            for name, values in term.finish(self._trained, self._context).items():
                if unknown := sorted(values.keys() - self.parameters.keys()):
                    raise TrainingError(
                        f"{type(term).__name__}.finish gave {name} for {unknown[0]}, which is not a parameter of the "
                        "adapter: tensors of a client are by name and parameter"
                    )
                tensors |= {f"{name}|{key}": tensor for key, tensor in values.items()}
        kept = {key: t for key, t in self._begin.optimizer.items() if key.partition("|")[0] not in self._trained}
        trained = {} if self._optimizer is None else read_optimizer(self._optimizer, self._trained)
        return SlotState(_copies(self.parameters), _copies({**kept, **trained}), {}, _copies(tensors))

    def _correct(self) -> None:
        """Undo the scale of the loss and apply the local terms to the gradients, once a step."""
        if self._has_corrected:
            return
        self._has_corrected = True
        if self.scaler is not None and self._optimizer is not None:
            self.scaler.unscale_(self._optimizer)
        if not self.terms:
            return
        with torch.enable_grad():  # a server in this process answers within the client's backward pass
            losses = [term.loss(self._trained, self._context) for term in self.terms]
        for loss in losses:
            if loss is not None and loss.requires_grad:  # a side can have no trained parameters
                loss.backward()
        gradients = {name: p.grad for name, p in self._trained.items() if p.grad is not None}
        with torch.no_grad():
            for term in self.terms:
                term.correct(gradients, self._context)
        for name, parameter in self._trained.items():
            if not all(term.trains(name, self._context) for term in self.terms):
                parameter.grad = None

    def _new_context(self) -> TermContext:
        device = next(iter(self.parameters.values())).device if self.parameters else torch.device("cpu")

        def nested(tensors: Adapter) -> dict[str, dict[str, Tensor]]:
            found: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
            for key, tensor in tensors.items():
                name, _, parameter = key.partition("|")
                found[name][parameter] = tensor.to(device)
            return dict(found)

        received = {name: tensor.to(device) for name, tensor in self._begin.adapter.items()}
        anchors, tensors = nested(self._begin.anchors), nested(self._begin.tensors)
        return TermContext(received, anchors, tensors, total_steps=self._begin.total_steps)


def new_parameters(canonical: Mapping[str, nn.Parameter], begin: SlotState) -> dict[str, nn.Parameter]:
    """Parameters of one client, with the types and on the devices of the model's own.

    Args:
        canonical: The model's own parameters, by name.
        begin: The values, and which of them are trained.
    """
    trains = begin.trains
    return {
        name: nn.Parameter(
            begin.adapter[name].to(parameter.device, parameter.dtype, copy=True),
            requires_grad=trains is None or name in trains,
        )
        for name, parameter in canonical.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]
) -> None:
    """Let an optimiser continue from a client's state.

    Args:
        optimizer: Over these parameters.
        parameters: By name.
        state: By ``parameter|key``; parameters that are absent start with an empty state. Copied.
    """
    found: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
    for path, value in state.items():
        name, _, key = path.partition("|")
        if name in parameters:
            parameter = parameters[name]
            # AdamW keeps its step counter on the CPU.
            found[parameter][key] = value.to("cpu" if key == "step" else parameter.device, copy=True)
    optimizer.state = defaultdict(dict, found)


def read_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """An optimiser's state by ``parameter|key``; parameters that never had a gradient have none."""
    return {
        f"{name}|{key}": torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def clip_factor(norms: Mapping[str, float], largest: float | None) -> float:
    """What all gradients of a step are multiplied by, as ``torch.nn.utils.clip_grad_norm_`` does.

    Args:
        norms: Norm of each parameter's gradient, by name.
        largest: Largest norm of all of them together; ``None`` for no clipping.

    Example:
        >>> round(clip_factor({"a": 3.0, "b": 4.0}, 1.0), 6)
        0.2
        >>> clip_factor({"a": 0.5}, 1.0)
        1.0
    """
    if largest is None:
        return 1.0
    total = torch.linalg.vector_norm(torch.tensor([norms[name] for name in sorted(norms)], dtype=torch.float32))
    return float(torch.clamp(largest / (total + 1e-6), max=1.0))


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
