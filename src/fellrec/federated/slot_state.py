"""What a slot begins and ends with, and how it becomes parameters and the state of an optimiser."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fellrec.federated.records import Job
from fellrec.types import Adapter

SECOND = "second"
"""Name of a second model's values among a client's tensors; its optimiser state is under ``parameter|second.key``."""


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
            """Those whose parameter, the second part of the key, is wanted."""
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

    def of_second(self) -> SlotState:
        """What the client's second model begins with; with the adapter's values if it has none yet."""
        return replace(
            self,
            adapter={name: self.tensors.get(f"{SECOND}|{name}", tensor) for name, tensor in self.adapter.items()},
            optimizer={k.replace(f"|{SECOND}.", "|"): t for k, t in self.optimizer.items() if f"|{SECOND}." in k},
            tensors={key: t for key, t in self.tensors.items() if not key.startswith(f"{SECOND}|")},
        )

    def with_second(self, second: SlotState) -> SlotState:
        """The same with what the second model ended with."""
        moments = {key.replace("|", f"|{SECOND}."): t for key, t in second.optimizer.items()}
        values = {f"{SECOND}|{name}": t for name, t in second.adapter.items()}
        return replace(
            self, optimizer={**self.optimizer, **moments}, tensors={**self.tensors, **second.tensors, **values}
        )


def new_parameters(canonical: Mapping[str, nn.Parameter], begin: SlotState) -> dict[str, nn.Parameter]:
    """Parameters of one client, with the types and on the devices of the model's own.

    Args:
        canonical: The model's own parameters, by name; all of them are needed in ``begin``.
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
        if name in parameters and not key.startswith(f"{SECOND}."):
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
