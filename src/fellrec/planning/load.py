"""The load of a round: steps, tokens, and the largest micro-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from fellrec.data.datamodule import FellrecDataModule
from fellrec.federated.settings import TrainerSettings
from fellrec.functional.cost import RoundLoad
from fellrec.functional.rng import derive_seed
from fellrec.models.module import Objective, drawn
from fellrec.models.streams import LayerStreams, StreamPosition

Batch = dict[str, Tensor]

_BATCHES_PER_CLIENT = 200
_BATCHES = 1000
"""Maximum number of batches that are built, over all clients: a few seconds."""


@dataclass(frozen=True)
class Load:
    """The load of a round, counted on real batches.

    Attributes:
        mean: Load of one client, mean over all clients.
        largest_client: The client with the most steps.
        largest_batch: The micro-batch with the most tokens: one that was built, or the longest rows of a client.
        num_tokens_largest: Padded tokens of ``largest_batch``.
        is_sampled: Whether tokens were counted on a sample of the batches and scaled; steps are always exact.
    """

    mean: RoundLoad
    largest_client: int
    largest_batch: Batch
    num_tokens_largest: int
    is_sampled: bool


def count_load(
    datamodule: FellrecDataModule,
    objective: Objective,
    local: TrainerSettings,
    seed: int,
    held_out: float = 0.0,
    max_batches: int = _BATCHES,
) -> Load:
    """Count steps and padded tokens of the first round.

    Args:
        datamodule: Batches of each client.
        objective: Selects the token ids of a batch that go through the model.
        local: Settings of local training.
        seed: Of the run.
        held_out: Fraction of each client's rows that is not trained on.
        max_batches: Maximum number of batches to build, in addition to one per sampled client.
    """
    num_clients = datamodule.data.num_clients
    work = [count_work(datamodule.num_batches(client, held_out), local) for client in range(num_clients)]
    steps, micro_batches = [steps for steps, _ in work], [number for _, number in work]
    stride = -(-num_clients // max_batches)
    sampled_clients = range(0, num_clients, stride)
    limit = max(1, min(_BATCHES_PER_CLIENT, max_batches // len(sampled_clients)))
    tokens_seen, num_seen, per_client = 0, 0, []
    largest: tuple[int, Batch] = (0, {})
    for client in sampled_clients:
        counts = []
        for batch in islice(_batches(datamodule, local, seed, client, held_out), min(limit, micro_batches[client])):
            counts.append(_num_tokens(objective, batch))
            if counts[-1] > largest[0]:
                largest = (counts[-1], batch)
        longest = datamodule.longest_batch(client)
        if longest is not None and (size := _num_tokens(objective, longest)) > largest[0]:
            largest = (size, longest)
        tokens_seen, num_seen = tokens_seen + sum(counts), num_seen + len(counts)
        per_client.append(micro_batches[client] * sum(counts) / len(counts) if counts else 0.0)
    is_sampled = num_seen < sum(micro_batches)
    tokens = sum(per_client) * num_clients / len(per_client) if is_sampled else tokens_seen
    return Load(
        mean=RoundLoad(sum(steps) / num_clients, tokens / num_clients),
        largest_client=steps.index(max(steps)),
        largest_batch=largest[1],
        num_tokens_largest=largest[0],
        is_sampled=is_sampled,
    )


def count_pass(
    datamodule: FellrecDataModule,
    objective: Objective,
    held_out: float = 0.0,
    of_held_out: bool = False,
    max_batches: int = _BATCHES,
) -> tuple[float, float]:
    """Micro-batches and padded tokens of one pass over a client's rows, means over clients.

    Args:
        datamodule: Batches of each client.
        objective: As for `count_load`.
        held_out: As for `count_load`.
        of_held_out: Whether the pass is over the rows that are held out instead of the others.
        max_batches: As for `count_load`.
    """
    num_clients = datamodule.data.num_clients
    clients = range(0, num_clients, -(-num_clients // max_batches))
    limit = max(1, min(_BATCHES_PER_CLIENT, max_batches // len(clients)))
    batches = tokens = 0.0
    for client in clients:
        loader = datamodule.loss_loader(client, held_out, of_held_out)
        counts = [_num_tokens(objective, batch) for batch in islice(loader, limit)]
        batches += len(loader)
        tokens += len(loader) * sum(counts) / max(1, len(counts))
    return batches / len(clients), tokens / len(clients)


def count_work(num_batches: int, local: TrainerSettings) -> tuple[int, int]:
    """Optimiser steps and micro-batches of one client's round; an epoch's last step may have fewer micro-batches.

    Args:
        num_batches: Batches of one pass over the client's data.
        local: Settings of local training.

    Example:
        Two epochs of five batches, two per step, would be steps of 2, 2, 1, 2, 2, 1 batches; four steps are allowed.

        >>> local = TrainerSettings(local_epochs=2, accumulate_grad_batches=2, max_local_steps=4)
        >>> count_work(5, local)
        (4, 7)
    """
    together = local.accumulate_grad_batches
    in_epoch = -(-num_batches // together)
    steps = local.local_epochs * in_epoch
    if local.max_local_steps is not None:
        steps = min(steps, local.max_local_steps)
    epochs, left = divmod(steps, in_epoch) if in_epoch else (0, 0)
    return steps, epochs * num_batches + left * together


def _num_tokens(objective: Objective, batch: Batch) -> int:
    """Padded tokens that go through the model, with a sample of items as in training."""
    streams = LayerStreams({})
    with torch.random.fork_rng(devices=[]), streams.using(StreamPosition(0)):
        return sum(ids.numel() for ids in objective.inputs(drawn(objective, batch, streams)))


def _batches(
    datamodule: FellrecDataModule, local: TrainerSettings, seed: int, client: int, held_out: float
) -> Iterator[Batch]:
    """Batches in the order of the first round: padding depends on which rows are in the same batch."""
    for epoch in range(local.local_epochs):
        yield from datamodule.train_loader(client, derive_seed(seed, "order", 0, client, epoch), held_out)
