"""Losses that clients measure before they train: at the received adapter, of candidates, and to be chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from fellrec.aggregation.base import AggregationCallback
from fellrec.federated.samplers import Sampler
from fellrec.functional.cost import RoundLoad
from fellrec.state.tensor_store import StoredTensors


@dataclass(frozen=True)
class Losses:
    """How many losses are measured for each client that trains, in a round that is not the first.

    Attributes:
        at_start: Losses at the adapter that training starts from, which the client has.
        of_candidates: Losses of the rule's candidates, and of clients that the sampler chooses from.
        num_received: Adapters that are sent for these, beyond the one that comes back from aggregation.
    """

    at_start: float = 0.0
    of_candidates: float = 0.0
    num_received: float = 0.0


def losses_of(
    rule: AggregationCallback, sampler: Sampler, num_clients: int, num_drawn: int, num_training: int
) -> Losses:
    """What a rule and a sampler let clients measure.

    Args:
        rule: A rule of its own, which is begun here.
        sampler: Who is drawn.
        num_clients: C.
        num_drawn: Clients that a round needs, with over-selection.
        num_training: Clients that train in a round.
    """
    of_candidates = num_received = 0.0
    if type(rule).candidates is not AggregationCallback.candidates:
        rule.begin({})
        adapters = [StoredTensors({}) for _ in range(num_clients)]
        asked = rule.candidates(0, adapters, 1)
        of_candidates += len(asked)
        num_received += sum(adapter is not adapters[0] for adapter in asked)
        num_received -= rule.keeps_trained  # candidates are all that comes back, and traffic counts one adapter anyway
    if sampler.by_loss:
        all_clients = np.arange(num_clients)
        chosen_from = len(sampler.draw(all_clients, np.ones_like(all_clients), num_drawn, np.random.default_rng(0)))
        of_candidates += chosen_from / num_training
        num_received += chosen_from / num_training
    return Losses(float(rule.needs_start_loss), of_candidates, num_received)


def with_losses(load: RoundLoad, losses: Losses, count: Callable[[bool], tuple[float, float]]) -> RoundLoad:
    """The load of a client with what it measures.

    Args:
        load: Without it.
        losses: What is measured.
        count: Batches and tokens of one pass over a client's training rows, or over those that are measured.
    """
    batches = tokens = 0.0
    for number, is_start in ((losses.at_start, True), (losses.of_candidates, False)):
        if number:
            in_pass = count(is_start)
            batches, tokens = batches + number * in_pass[0], tokens + number * in_pass[1]
    return replace(
        load,
        measured_batches=batches,
        measured_tokens=tokens,
        num_losses=losses.at_start + losses.of_candidates,
        num_received=losses.num_received,
    )
