"""One side's part of one client's parameters while the client is trained: values, gradients, optimiser."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from fellrec.errors import TrainingError
from fellrec.federated.slot_state import SlotState, load_optimizer, new_parameters, read_optimizer
from fellrec.federated.terms import LocalTerm, SecondModel, TermContext
from fellrec.types import Adapter


class Slot(Protocol):
    """Where the gradients of a client's local step end up; in this process, or on both sides of a cut."""

    @property
    def second(self) -> SecondSlot | None:
        """The slot of the client's second model, if it has one."""

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
        second: The slot of the client's second model, which ends up in the state of this one.

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
        second: SecondSlot | None = None,
    ) -> None:
        self.parameters = parameters
        self.terms = terms
        self.second = second
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
        found = torch.stack([norm.float() for norm in torch._foreach_norm(list(gradients.values()))])
        return dict(zip(gradients, found.tolist(), strict=True))

    def step(self, clip_factor: float, learning_rate: float) -> None:
        """See ``Slot``."""
        if self._optimizer is None:
            return
        self._context.learning_rate = learning_rate
        self._correct()
        gradients = [parameter.grad for parameter in self._trained.values() if parameter.grad is not None]
        if clip_factor != 1.0 and gradients:
            torch._foreach_mul_(gradients, torch.tensor(clip_factor, dtype=torch.float32).to(gradients[0].device))
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
        state = SlotState(_copies(self.parameters), _copies({**kept, **trained}), {}, _copies(tensors))
        return state if self.second is None else state.with_second(self.second.state())

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
            """Tensors by ``name|parameter`` as name → parameter → tensor, on the device."""
            found: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
            for key, tensor in tensors.items():
                name, _, parameter = key.partition("|")
                found[name][parameter] = tensor.to(device)
            return dict(found)

        received = {name: tensor.to(device) for name, tensor in self._begin.adapter.items()}
        anchors, tensors = nested(self._begin.anchors), nested(self._begin.tensors)
        return TermContext(received, anchors, tensors, total_steps=self._begin.total_steps)


class SecondSlot(LocalSlot):
    """The second model of one client; see ``SecondModel``.

    Args:
        parameters: Its own parameters, by name.
        begin: What it begins with, see ``SlotState.of_second``.
        optimizer: Over those of the parameters that are trained.
        model: The rule's.
        beside: Parameters of the client's adapter.
        using: Puts parameters into the model while it lasts.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        begin: SlotState,
        optimizer: torch.optim.Optimizer,
        model: SecondModel,
        beside: Mapping[str, nn.Parameter],
        using: Callable[[Mapping[str, Tensor]], AbstractContextManager[None]],
    ) -> None:
        super().__init__(parameters, begin, optimizer, [model])
        self._context.beside = beside
        self._model = model
        self._using = using
        self._own: dict[str, Tensor] = {}

    @contextmanager
    def at_point(self) -> Iterator[None]:
        """While this lasts, the model computes with the values at which the gradient of the step is taken.

        The parameters have their own values again before the gradients are changed, or at the end.
        """
        with torch.no_grad():
            values = self._model.point(self.parameters, self._context)
            self._own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            for name, value in values.items():
                self.parameters[name].copy_(value)
        try:
            with self._using(self.parameters):
                yield
        finally:
            self._return()

    def _correct(self) -> None:
        self._return()
        super()._correct()

    @torch.no_grad()
    def _return(self) -> None:
        for name, value in self._own.items():
            self.parameters[name].copy_(value)
        self._own = {}


def second_slot(
    model: SecondModel | None,
    begin: SlotState,
    beside: Mapping[str, nn.Parameter],
    build: Callable[[Mapping[str, nn.Parameter]], torch.optim.Optimizer],
    using: Callable[[Mapping[str, Tensor]], AbstractContextManager[None]],
) -> SecondSlot | None:
    """The slot of a client's second model; ``None`` if the rule has none, or nothing is trained.

    Args:
        model: The rule's.
        begin: What the client begins with.
        beside: Parameters of its adapter.
        build: Makes an optimiser over parameters, while they are in the model.
        using: Puts parameters into the model.
    """
    if model is None or not any(parameter.requires_grad for parameter in beside.values()):
        return None
    own = begin.of_second()
    parameters = new_parameters(beside, own)
    with using(parameters):
        optimizer = build(parameters)
    return SecondSlot(parameters, own, optimizer, model, beside, using)


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
