"""What the server receives of a client's local training through the executed cut, and the truth to score it with.

Nothing is computed again here: `Tap` stands between the link and the server and keeps the messages of one local step,
so that dropout and rounding are those of the run.

Shape letters: B rows, L tokens, D hidden size, T targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fellrec.attacks.titles import title_numbers
from fellrec.cut.link import Transport
from fellrec.cut.messages import Gradient, GradientReply, HiddenReply, HiddenState
from fellrec.data.datamodule import FellrecDataModule
from fellrec.distributed.message import Message
from fellrec.federated.client_model import ClientModel
from fellrec.federated.local import LocalTrainer
from fellrec.federated.records import Job
from fellrec.functional.packing import Packed, unpack
from fellrec.models.objectives.groups import RowGroups

ITEMS = "observed_items"
"""Entry of a batch with the items of its rows, which is added for the truth and which no objective reads."""


class Tap:
    """A transport that keeps what passes.

    Args:
        transport: Carries the messages.

    Attributes:
        messages: All of them, in both directions, in their order.
    """

    def __init__(self, transport: Transport) -> None:
        self.process = transport.process
        self.messages: list[Message] = []
        self._transport = transport

    def send(self, message: Message) -> None:
        """See ``Transport``."""
        self.messages.append(message)
        self._transport.send(message)

    def receive(self) -> Message:
        """See ``Transport``."""
        message = self._transport.receive()
        self.messages.append(message)
        return message


@dataclass(frozen=True)
class Observed:
    """One micro-batch of one client, as the server sees it, and the truth. Lists have one entry a forward pass.

    Attributes:
        client: Whose.
        first: ``[B, L, D]`` hidden states of the first cut, which the client sends.
        second: ``[B, L, D]`` hidden states of the second cut, which the server returns.
        first_gradient: ``[B, L, D]`` gradients of ``first``, which the server computes; empty if the head is frozen.
        second_gradient: ``[B, L, D]`` gradients of ``second``, which the client sends.
        ids: ``[B, L]`` int64 token ids. The truth, as the following.
        titles: ``[B, L]`` int64 number of the title that each token belongs to, from 0 in each entry; -1 for none.
        batch: The whole batch of the objective.
    """

    client: int
    first: list[Tensor]
    second: list[Tensor]
    first_gradient: list[Tensor]
    second_gradient: list[Tensor]
    ids: list[Tensor]
    titles: list[Tensor]
    batch: dict[str, Tensor]


def with_items(datamodule: FellrecDataModule) -> FellrecDataModule:
    """Let the batches of a data module name the items of their rows, ``[B, W + 1]``; gives the data module."""
    collate = datamodule.collate
    datamodule.collate = lambda items, is_target: {**collate(items, is_target), ITEMS: items}
    return datamodule


def one_step(trainer: LocalTrainer, model: ClientModel) -> LocalTrainer:
    """A trainer of the same clients that takes one step with one batch.

    Args:
        trainer: Of the run.
        model: Puts clients' parameters into the recommender.
    """
    once = replace(trainer.settings, local_epochs=1, max_local_steps=1, accumulate_grad_batches=1)
    return LocalTrainer(trainer.fabric, trainer.module, trainer.datamodule, model, once, trainer.seed)


def observe(trainer: LocalTrainer, tap: Tap, job: Job) -> Observed:
    """Let a client train one step through the cut, and keep what crosses it.

    Args:
        trainer: Of `one_step`, with batches of `with_items` and the client's model of an executed cut.
        tap: Between that model's link and the server.
        job: Whose training, from which adapter.
    """
    (batch,) = next(iter(trainer.batches(job)))
    tap.messages.clear()
    trainer.train(job, lambda loss: None)
    device = batch["input_ids"].device

    def tensors(kind: type, field: str, num: int) -> list[Tensor]:
        """The first tensors of the first message of a kind."""
        packed: Sequence[Packed] = next((getattr(m, field) for m in tap.messages if isinstance(m, kind)), ())
        return [unpack(one, torch.float32, device) for one in packed[:num]]

    ids, rows = groups_of(batch)
    return Observed(
        client=job.client,
        first=tensors(HiddenState, "hidden", len(ids)),
        second=tensors(HiddenReply, "hidden", len(ids)),
        first_gradient=tensors(GradientReply, "gradient", len(ids)),
        second_gradient=tensors(Gradient, "gradient", len(ids)),
        ids=ids,
        titles=[
            title_numbers(trainer.module.objective, some, batch[ITEMS][own])
            for some, own in zip(ids, rows, strict=True)
        ],
        batch=batch,
    )


def groups_of(batch: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Token ids ``[B, L]`` of each forward pass of a batch's histories, and the rows ``[B]`` of the batch in it."""
    ids = batch["input_ids"]
    numbers = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    groups = RowGroups(batch["lengths"])
    return groups.inputs(ids), [some[:, 0] for some in groups.inputs(numbers)]
