"""Random numbers of layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fellrec.functional.rng import derive_seed
from fellrec.models.streams import OF_LOSS, LayerStreams, StreamPosition


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1])
def test_a_layer_draws_what_torchs_own_seed_gives(seed: int) -> None:
    """The second pass of layer 3, with PyTorch seeded by hand for it."""
    layer = nn.Dropout(0.5)
    streams, position, ones = LayerStreams({3: layer}), StreamPosition(seed), torch.ones(64)
    with torch.random.fork_rng():
        with streams.using(position):
            first, second = layer(ones), layer(ones)
        torch.manual_seed(derive_seed(seed, 3, 1))
        assert torch.equal(second, torch.nn.functional.dropout(ones, 0.5))
    assert not torch.equal(first, second)
    assert position.calls == {3: 2}


def test_ranks_that_train_a_client_together_share_the_numbers_of_the_loss_only() -> None:
    """The second rank has no row of the first batch and skips its numbers."""
    layer = nn.Dropout(0.5)
    streams, ones = LayerStreams({3: layer}), torch.ones(64)
    drawn = []
    with torch.random.fork_rng():
        for position, skips in ((StreamPosition(7), False), (StreamPosition(8, seed_of_loss=7), True)):
            with streams.using(position):
                dropped = layer(ones)
                streams.skip(OF_LOSS) if skips else streams.enter(OF_LOSS)
                streams.enter(OF_LOSS)
                drawn.append((dropped, torch.rand(8)))
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
