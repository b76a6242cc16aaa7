"""Clients that misbehave: what they send instead of what they trained, and the items that stand in their training rows.

Honest clients are trained as without them: they read nothing of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from fellrec.federated.jobs import Failed, Trained
from fellrec.federated.ranks import Ranks
from fellrec.federated.settings import PoisonSettings
from fellrec.functional.rng import derive_seed
from fellrec.state.tensor_store import StoredTensors

Leaving = Callable[[Trained], Mapping[str, Tensor]]
"""Gives the tensors that leave a client after its training."""

_IN_ROWS = ("none", "label_flip")
"""Kinds with which clients send what they trained."""


class Poison:
    """Replaces what some clients send; what stays at a client, and what a server trains for it, is not changed.

    Args:
        settings: Who misbehaves, and how.
    """

    def __init__(self, settings: PoisonSettings) -> None:
        self.settings = settings
        self.clients = frozenset(settings.clients)

    def sent(
        self, outcomes: Sequence[Trained | Failed], leaving: Leaving, ranks: Ranks | None = None
    ) -> list[Trained | Failed]:
        """The outcomes of a round as the server receives them.

        Args:
            outcomes: What the clients trained.
            leaving: What leaves each of them.
            ranks: LoRA ranks of the clients, if they differ.

        Returns:
            In the same order. An adapter with values that are not finite is refused: its client has failed.
        """
        if self.settings.kind in _IN_ROWS:
            return list(outcomes)
        honest = next((t for t in outcomes if isinstance(t, Trained) and t.job.client not in self.clients), None)
        other = {} if honest is None else dict(leaving(honest))

        def received(outcome: Trained | Failed) -> Trained | Failed:
            """One outcome as the server receives it."""
            if isinstance(outcome, Failed) or outcome.job.client not in self.clients:
                return outcome
            start = outcome.job.adapter.tensors()
            wrong = {
                name: self._instead(start[name], end, other.get(name, start[name]))
                for name, end in leaving(outcome).items()
            }
            if ranks is not None:
                wrong = {name: ranks.cut(outcome.row, name, tensor) for name, tensor in wrong.items()}
            if bad := next((name for name, tensor in wrong.items() if not bool(tensor.isfinite().all())), None):
                return Failed(outcome.job, _refused(bad, outcome))
            return replace(outcome, adapter=StoredTensors({**outcome.adapter.tensors(), **wrong}))

        return [received(outcome) for outcome in outcomes]

    def _instead(self, start: Tensor, end: Tensor, other: Tensor) -> Tensor:
        """What is sent of a parameter, given its value before and after training and that of an honest client."""
        match self.settings.kind:
            case "not_finite":
                return torch.full_like(end, torch.nan)
            case "copy":
                return other.to(end.dtype)
            case "sign_flip":
                factor = -self.settings.scale
            case _:
                factor = self.settings.scale
        return (start.double() + factor * (end.double() - start.double())).to(end.dtype)


def relabelled(settings: PoisonSettings, bounds: Sequence[int]) -> dict[int, Tensor]:
    """Clients of ``label_flip`` → ``[I]`` int64, the item that takes the place of each as a target.

    A permutation that leaves no item in its place, the same for all of these clients. Items stay in their data set.

    Args:
        settings: Who misbehaves, and how.
        bounds: Of the items of each data set, ``[0, …, I]``.

    Example:
        >>> other = relabelled(PoisonSettings(clients=[2], kind="label_flip"), [0, 3, 5])[2]
        >>> sorted(other[:3].tolist()), other[3:].tolist(), (other == torch.arange(5)).any().item()
        ([0, 1, 2], [4, 3], False)
    """
    if settings.kind != "label_flip":
        return {}
    generator = torch.Generator().manual_seed(derive_seed(settings.seed, "label_flip"))
    other = torch.empty(bounds[-1], dtype=torch.int64)
    for first, end in pairwise(bounds):
        cycle = first + torch.randperm(end - first, generator=generator)
        other[cycle] = cycle.roll(1)
    return dict.fromkeys(settings.clients, other)


def problems(settings: PoisonSettings, num_clients: int) -> Iterator[str]:
    """What is wrong with the settings for a number of clients, one line each."""
    wrong = [client for client in settings.clients if client >= num_clients]
    if wrong:
        yield (
            f"poison.clients={list(settings.clients)}: client {wrong[0]} does not exist; choose from 0 to "
            f"{num_clients - 1}"
        )
    elif len(settings.clients) >= num_clients:
        yield f"poison.clients={list(settings.clients)}: all {num_clients} clients misbehave; leave at least one out"


def _refused(name: str, outcome: Trained) -> str:
    job = outcome.job
    return (
        f"the server refuses {name} of {job.who} in round {job.round_index}: it has values that are not finite "
        "(poison.clients); participation.on_failure=skip leaves the client out of the round"
    )
