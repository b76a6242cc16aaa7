"""One client's adapter while it is trained beside others: tensors, gradients and optimiser of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fellrec.federated.state import OptimizerState
from fellrec.models.module import OptimizerSettings
from fellrec.models.streams import StreamPosition


class AdapterSlot:
    """Holds what a client's local training changes, so that several clients can be under way in one backbone.

    Args:
        canonical: The backbone's own parameters, for types and devices.
        adapter: The client's adapter, parameter name → tensor; copied.
        optimizer: AdamW's settings.
        optimizer_state: Of the client's earlier rounds, by parameter name; taken over.
        streams: The client's random numbers of this round.
    """

    def __init__(
        self,
        canonical: Mapping[str, nn.Parameter],
        adapter: Mapping[str, Tensor],
        optimizer: OptimizerSettings,
        optimizer_state: OptimizerState,
        streams: StreamPosition,
    ) -> None:
        self.canonical = canonical
        self.streams = streams
        self.parameters = {
            name: nn.Parameter(adapter[name].to(parameter.device, parameter.dtype, copy=True))
            for name, parameter in canonical.items()
        }
        self._optimizer = optimizer.build(list(self.parameters.values())) if self.parameters else None
        if self._optimizer is not None:
            load_optimizer(self._optimizer, self.parameters, optimizer_state)

    def add_gradients(self, gradients: Iterable[Tensor | None]) -> None:
        """Add gradients to those of the step so far.

        Args:
            gradients: One per parameter in order of the names; ``None`` where there is none.
        """
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def norms(self) -> Tensor:
        """``[P]`` float32: the norm of each parameter's gradient by sorted name, -1 where there is none."""
        gradients = [parameter.grad for parameter in self.parameters.values()]
        found = [torch.linalg.vector_norm(g).float() if g is not None else torch.tensor(-1.0) for g in gradients]
        return torch.stack([norm.cpu() for norm in found]) if found else torch.empty(0)

    def step(self, clip_factor: float, learning_rate: float) -> None:
        """Scale the gradients, take one optimiser step, and forget them."""
        if self._optimizer is None:
            return
        if clip_factor != 1.0:
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad.mul_(torch.tensor(clip_factor, dtype=torch.float32).to(parameter.grad.device))
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def optimizer_state(self) -> OptimizerState:
        """The optimiser's state for the next round, by parameter name."""
        return {} if self._optimizer is None else read_optimizer(self._optimizer, self.parameters)


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], state: OptimizerState
) -> None:
    """Let an optimiser go on from a client's state.

    Args:
        optimizer: Over these parameters.
        parameters: By name.
        state: By the same names; what is missing starts anew. Taken over.
    """
    optimizer.state = defaultdict(dict)
    for name, of in state.items():
        parameter = parameters[name]
        # AdamW keeps its step counter on the CPU.
        optimizer.state[parameter] = {
            key: value if key == "step" else value.to(parameter.device) for key, value in of.items()
        }


def read_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> OptimizerState:
    """An optimiser's state by the names of its parameters; those that never had a gradient have none."""
    return {name: dict(optimizer.state[p]) for name, p in parameters.items() if optimizer.state.get(p)}


def clip_factor(norms: Mapping[str, float], largest: float | None) -> float:
    """What all gradients of a step are multiplied by, as ``torch.nn.utils.clip_grad_norm_`` does.

    Args:
        norms: Norm of each parameter's gradient, by name; negative ones stand for no gradient.
        largest: Largest norm of all of them together, ``None`` for no clipping.

    Example:
        >>> round(clip_factor({"a": 3.0, "b": 4.0, "c": -1.0}, 1.0), 6)
        0.2
        >>> clip_factor({"a": 0.5}, 1.0)
        1.0
    """
    if largest is None:
        return 1.0
    present = [norms[name] for name in sorted(norms) if norms[name] >= 0 or norms[name] != norms[name]]
    total = torch.linalg.vector_norm(torch.tensor(present, dtype=torch.float32))
    return float(torch.clamp(largest / (total + 1e-6), max=1.0))
