"""Clients whose loss is ``h_k / 2 ‖v − t_k‖²``, trained by the real slot with plain SGD: rounds that NumPy can repeat."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext

import torch
from fakes import FakeExecutor
from torch import nn

from fellrec.aggregation import AggregationCallback
from fellrec.federated.callback import Events
from fellrec.federated.records import Failed, Job, LossJob, Trained
from fellrec.federated.slot import LocalSlot, second_slot
from fellrec.federated.slot_state import SlotState, new_parameters
from fellrec.state.tensor_store import StoredTensors

RATE = 0.1
"""The learning rate."""
TARGETS = [(1.0, -2.0), (3.0, 0.5), (-1.0, 4.0)]
"""t_k of three clients, the same for both parameters of the fake loop."""
CURVATURES = [1.0, 0.5, 2.0]
"""h_k."""
SAMPLES = [1, 3, 4]
STEPS = [3, 5, 4]


class QuadraticExecutor(FakeExecutor):
    """Trains with the rule's local terms.

    Args:
        rule: Has the terms.
        clip: The gradients are multiplied by it after the terms have changed them.
    """

    def __init__(self, rule: AggregationCallback, clip: float = 1.0) -> None:
        super().__init__()
        self.rule, self.clip = rule, clip

    def train(self, jobs: Sequence[Job], events: Events) -> Iterator[Trained | Failed]:
        for job in jobs:
            events.client_starts(job)
            yield self.train_one(job)

    def train_one(self, job: Job) -> Trained:
        client, begin = job.client, SlotState.of(job, STEPS[job.client])
        parameters = new_parameters({name: nn.Parameter(t.clone()) for name, t in begin.adapter.items()}, begin)
        second = second_slot(self.rule.second_model, begin, parameters, self.optimizer, nullcontext)
        slot = LocalSlot(parameters, begin, self.optimizer(parameters), self.rule.local_terms, second)
        for _ in range(STEPS[client]):
            if second is not None:
                with second.at_point():
                    self.loss(client, second.parameters).backward()
                    second.step(self.clip, RATE)
            slot.before_backward(False, RATE)
            self.loss(client, parameters).backward()
            slot.step(self.clip, RATE)
        state = slot.state()
        stored = StoredTensors(state.adapter), StoredTensors(state.optimizer)
        return Trained(job, *stored, loss=1.0, num_samples=SAMPLES[client], num_steps=STEPS[client], seconds=0.0,
                       tensors=StoredTensors(state.tensors))  # fmt: skip

    def measure(self, jobs: Sequence[LossJob]) -> list[tuple[float, ...]]:
        found = []
        for job in jobs:
            values = [{n: nn.Parameter(t) for n, t in adapter.tensors().items()} for adapter in job.adapters]
            found.append(tuple(float(self.loss(job.client, parameters).detach()) for parameters in values))
        return found

    @staticmethod
    def optimizer(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(parameters.values()), lr=RATE)

    @staticmethod
    def loss(client: int, parameters: Mapping[str, nn.Parameter]) -> torch.Tensor:
        """The client's loss over all parameters."""
        target = torch.tensor(TARGETS[client])
        total = torch.stack([(value - target).square().sum() for value in parameters.values()]).sum()
        return CURVATURES[client] / 2 * total
