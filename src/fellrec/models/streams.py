"""Random numbers per client, round and layer: dropout is the same wherever, and beside whatever, a layer runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fellrec.functional.rng import derive_seed

OF_LOSS = 1 << 20
"""The number of the loss's own stream, beyond those of all layers."""


@dataclass
class StreamPosition:
    """How far one client's random numbers of one round have been used up, layer by layer.

    Attributes:
        seed: Of the client's round, see ``training_seed``; where several ranks train the client, of this rank's part.
        seed_of_loss: The same for all of these ranks, whose losses add up to one; ``None`` is ``seed``.
        calls: Forward passes so far, by layer.
        tables: Tensors that were computed for this training and are used in several steps, by who computed them.
        place: Where the client is in the numbers of the present layer, see `drawing`: their seed, or the state of the
            generator after the last draw.
    """

    seed: int
    seed_of_loss: int | None = None
    calls: dict[int, int] = field(default_factory=dict)
    tables: dict[object, Tensor] = field(default_factory=dict)
    place: int | Tensor = 0

    def count(self, number: int) -> int:
        """Count a forward pass of a layer; gives the number of those before it."""
        call = self.calls.get(number, 0)
        self.calls[number] = call + 1
        return call

    def next_seed(self, number: int) -> int:
        """Count a forward pass of a layer; gives the seed of its random numbers."""
        seed = self.seed
        if number == OF_LOSS and self.seed_of_loss is not None:
            seed = self.seed_of_loss
        return derive_seed(seed, number, self.count(number))


class LayerStreams:
    """Seeds the generators before every layer's forward pass, from (client's round, layer, number of the pass).

    One stream for a whole model could not be cut: a server's dropout would depend on what clients drew before.

    Args:
        layers: Modules by number; negative ones act before the first layer.
    """

    def __init__(self, layers: Mapping[int, nn.Module]) -> None:
        self._position: StreamPosition | None = None
        self._beside: Sequence[StreamPosition] = ()
        for number, layer in layers.items():
            layer.register_forward_pre_hook(self._hook(number))

    @property
    def position(self) -> StreamPosition | None:
        """Of the client that is being trained; ``None`` outside of ``using``."""
        return self._position

    def enter(self, number: int) -> None:
        """Seed the generators as before a layer's forward pass, for whoever draws numbers and is no layer."""
        if self._position is not None:
            _seed_generators(self._position.next_seed(number))
        for position in self._beside:
            position.place = position.next_seed(number)

    def skip(self, number: int) -> int:
        """Count a forward pass, as of a layer that others compute; gives the number of those before it."""
        return 0 if self._position is None else self._position.count(number)

    @contextmanager
    def using(self, position: StreamPosition | None) -> Iterator[None]:
        """Draw from one client's streams; outside of it, and with ``None``, nothing is seeded or counted."""
        previous, self._position = self._position, position
        try:
            yield
        finally:
            self._position = previous

    @contextmanager
    def using_jointly(self, positions: Sequence[StreamPosition]) -> Iterator[None]:
        """The rows of several clients go through the layers together; who draws numbers does so inside `drawing`."""
        with self.using(None):
            self._beside = positions
            try:
                yield
            finally:
                self._beside = ()

    def _hook(self, number: int) -> Any:
        def seed(module: nn.Module, inputs: object) -> None:
            """Seed the generators for the layer."""
            self.enter(number)

        return seed


@contextmanager
def drawing(position: StreamPosition, device: torch.device) -> Iterator[None]:
    """Draw one client's numbers where several clients are in one forward pass, from where its last draw ended."""
    generator = torch.cuda.default_generators[device.index or 0] if device.type == "cuda" else torch.default_generator
    if isinstance(position.place, int):
        generator.manual_seed(position.place)
    else:
        generator.set_state(position.place)
    yield
    position.place = generator.get_state()


def training_seed(seed: int, round_index: int, client: int) -> int:
    """The seed of all random numbers that one client's local training of one round uses."""
    return derive_seed(seed, "train", round_index, client)


def _seed_generators(seed: int) -> None:
    """As ``torch.manual_seed``, which formats a stack trace each time for a GPU that was not used yet.

    In front of every layer that took a third of a small model's training time.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
