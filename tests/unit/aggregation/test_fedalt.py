"""FedALT: what clients receive of the others, in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fellrec.aggregation import FedALT
from fellrec.federated.records import Updates

NAMES = [f"x.lora_{which}_{factor}" for which in ("own", "rest") for factor in "ab"] + ["x.lora_router", "norm"]


def round_of(num_clients: int) -> Updates:
    """What the rule sees of a round: the clients' own factors."""
    random, rule = np.random.default_rng(0), FedALT()
    sent = [name for name in NAMES if rule.trains(name, 0) and rule.exchanges(name, 0)]
    end = {name: torch.from_numpy(random.standard_normal((num_clients, 3, 2))) for name in sent}
    ones = torch.ones(num_clients).double()
    return Updates(tuple(range(num_clients)), {n: 0 * t for n, t in end.items()}, end, ones, ones)


def test_others_factors_are_frozen_and_only_own_ones_leave_a_client() -> None:
    rule = FedALT()
    assert {n for n in NAMES if not rule.trains(n, 3)} == {"x.lora_rest_a", "x.lora_rest_b"}
    assert {n for n in NAMES if rule.exchanges(n, 3)} == {"x.lora_own_a", "x.lora_own_b"}


@pytest.mark.parametrize("num_clients", [2, 5])
def test_a_client_receives_the_mean_of_the_others(num_clients: int) -> None:
    updates = round_of(num_clients)
    result = FedALT().aggregate(updates, 0)
    assert set(result.adapters) == {"x.lora_rest_a", "x.lora_rest_b"}
    for factor in "ab":
        own = updates.end[f"x.lora_own_{factor}"].numpy()
        for client in range(num_clients):
            expected = np.delete(own, client, axis=0).mean(axis=0)
            np.testing.assert_allclose(result.adapters[f"x.lora_rest_{factor}"][client], expected, atol=1e-12)
    assert result.matrices["mixing"].diagonal().tolist() == [0.0] * num_clients


def test_a_client_that_is_alone_receives_nothing() -> None:
    assert not dict(FedALT().aggregate(round_of(1), 0).adapters)
