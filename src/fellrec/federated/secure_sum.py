"""Secure sums of a round in a simulation: every client's part of the protocol is carried out in this process.

What is shown is the arithmetic and its cost, not isolation: the process has all adapters, see docs/secure_sums.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Size, Tensor

from fellrec.errors import TrainingError
from fellrec.federated.masked_sum import NUMBER_BYTES, Member, PublicKeys, Server, threshold
from fellrec.federated.settings import ExchangeSettings
from fellrec.functional.fixed_point import decode, encode, largest
from fellrec.types import Adapter


class Rule(Protocol):
    """What must be known of an aggregation rule."""

    sees: str
    client_tensors: Sequence[str]
    limits: Any
    """Has ``asynchronous``."""

    @property
    def name(self) -> str:
        """For messages."""


Record = Callable[[int, str, str, int], None]
"""Notes what crosses between a client and the server: client, direction, kind and bytes."""
LEAST_CLIENTS = 3
"""With two, each could subtract its own vector from the sum."""
_WEIGHT_BYTES = 8


def secure_problems(rule: Rule, config: Mapping[str, Any]) -> Iterator[str]:
    """Why a rule or another setting cannot be combined with ``exchange.secure``; nothing if it is off.

    Args:
        rule: The rule.
        config: The configuration, plain values.
    """
    exchange = config.get("exchange") or {}
    if exchange.get("secure") is not True:
        return
    why = {
        "reads every client's adapter, and with secure sums the server has none of them": rule.sees == "adapters",
        f"reads the clients' own tensors ({', '.join(rule.client_tensors)}) one by one, which are not summed": bool(
            rule.client_tensors
        ),
        "is asynchronous: updates arrive one by one, and a sum of one is the update": rule.limits.asynchronous,
    }
    for text in (text for text, applies in why.items() if applies):
        yield (
            f"aggregation {rule.name} {text}: exchange.secure=true is not allowed, use false or a rule that needs sums "
            "only"
        )
    if (config.get("privacy") or {}).get("unit", "none") != "none":
        yield "exchange.secure=true is not allowed with privacy, whose server clips each update: use privacy=none"
    if (transport := (config.get("split") or {}).get("transport", "none")) != "none":
        yield (
            f"exchange.secure=true is not allowed with split.transport={transport}: the server trains the body for "
            "each client and has its adapter; use split.transport=none"
        )
    for node in exchange.get("transforms") or ():
        name = str(node.get("_target_")).rpartition(".")[2] if isinstance(node, Mapping) else ""
        if name in ("Quantise", "TopK"):
            yield (
                f"exchange.secure=true is not allowed with the transform {name.lower()}: what it sends cannot be "
                "added; use clip or noise"
            )


class SecureSum:
    """The one sum that a rule gets of a round.

    Args:
        rule: Its name, for messages.
        shapes: Of the exchanged parameters.
        clients: Those that send.
        starts: Opens what each of them received.
        ends: Opens what each of them sends.
        missing: Clients that took part in the exchange of keys and then dropped out.
        settings: Of the fixed point numbers.
        record: See `Record`.
    """

    def __init__(
        self,
        rule: str,
        shapes: Mapping[str, Size],
        clients: Sequence[int],
        starts: Sequence[Callable[[], Adapter]],
        ends: Sequence[Callable[[], Adapter]],
        missing: Sequence[int],
        settings: ExchangeSettings,
        record: Record,
    ) -> None:
        self.rule = rule
        self.shapes = shapes
        self.clients = clients
        self.missing = missing
        self.settings = settings
        self._starts, self._ends, self._record = starts, ends, record
        self._is_used = False
        num_all = len(clients) + len(missing)
        if num_all < LEAST_CLIENTS or len(clients) < threshold(num_all):
            raise TrainingError(
                f"exchange.secure: {len(clients)} of {num_all} clients have sent their update; needed are at least "
                f"{max(LEAST_CLIENTS, threshold(num_all))}, more than two thirds and at least {LEAST_CLIENTS}"
            )

    def total(self, weights: Tensor, of_updates: bool) -> dict[str, Tensor]:
        """``sum over n of weights[n] * end[n]``, or of ``weights[n] * (end[n] - start[n])``, float64 by parameter.

        Args:
            weights: ``[N]``, which the server tells each client.
            of_updates: Whether updates are summed instead of adapters.

        Raises:
            TrainingError: For a second sum of the round, or for a value that is not in the range of the numbers.
        """
        if self._is_used:
            raise TrainingError(
                f"aggregation {self.rule} asks for a second sum of one round: with exchange.secure=true there is one, "
                "because the server could solve several sums for single updates"
            )
        self._is_used = True
        members = {client: Member(client) for client in sorted([*self.clients, *self.missing])}
        keys = self._exchange_keys(members)
        server = Server(keys, list(members))
        for position, client in enumerate(self.clients):
            vector = self._vector(position, float(weights[position]), of_updates)
            masked = members[client].masked(vector)
            self._record(client, "down", "scalar", _WEIGHT_BYTES)
            self._record(client, "up", "masked", masked.nbytes)
            server.add(client, masked)
        revealed = {}
        for client in self.clients:
            self._record(client, "down", "key", NUMBER_BYTES * len(self.clients))
            revealed[client] = members[client].reveal(self.clients)
            self._record(client, "up", "key", revealed[client].nbytes)
        return self._by_parameter(decode(server.unmask(revealed), self.settings.secure_bits))

    def _exchange_keys(self, members: Mapping[int, Member]) -> dict[int, PublicKeys]:
        """Let all clients publish their keys and share their secrets."""
        keys = {client: member.publish() for client, member in members.items()}
        sent = {client: member.share(keys) for client, member in members.items()}
        for client, member in members.items():
            received = {other: shares[client] for other, shares in sent.items()}
            member.receive(received)
            others = [other for other in members if other != client]
            self._record(client, "up", "key", keys[client].nbytes)
            self._record(client, "down", "key", sum(NUMBER_BYTES + keys[other].nbytes for other in others))
            self._record(client, "up", "key", sum(NUMBER_BYTES + len(sent[client][other]) for other in others))
            self._record(client, "down", "key", sum(NUMBER_BYTES + len(received[other]) for other in others))
        return keys

    def _vector(self, position: int, weight: float, of_updates: bool) -> Any:
        """What a client adds to the sum, as integers."""
        end = self._ends[position]()
        start = self._starts[position]() if of_updates else {}
        parts = []
        for name in self.shapes:
            own = end[name].double()
            parts.append((weight * (own - start[name].double() if of_updates else own)).cpu().reshape(-1))
        values = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)
        bits, word = self.settings.secure_bits, self.settings.secure_word
        most, found = largest(len(self.clients), bits, word), float(values.abs().max()) if len(values) else 0.0
        if not found < most:  # also if it is not a number
            raise TrainingError(
                f"exchange.secure: client {self.clients[position]} has an entry of {found:g} times its weight, and "
                f"{len(self.clients)} clients can each add less than {most:g} with exchange.secure_bits={bits} and "
                f"exchange.secure_word={word}; lower exchange.secure_bits, or use exchange.secure_word=64"
            )
        return encode(values, bits, word)

    def _by_parameter(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [shape.numel() for shape in self.shapes.values()]
        pairs = zip(self.shapes.items(), flat.split(sizes), strict=True)
        return {name: part.reshape(shape) for (name, shape), part in pairs}
