"""FLTrust against NumPy, and its laws: what one client can do is bounded by the server's own update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fellrec.aggregation import FLTrust
from fellrec.errors import TrainingError
from fellrec.federated.records import Updates

Make = Callable[..., Updates]
Array = NDArray[np.float64]


@pytest.fixture
def updates(make_updates: Make) -> Updates:
    """Six clients, and the server, which moves like the first client with noise."""
    made = make_updates(6)
    noise = torch.Generator().manual_seed(1)
    end = {name: t[0] + 0.1 * torch.randn(t[0].shape, generator=noise) for name, t in made.end.items()}
    return dataclasses.replace(made, root=end)


def vectors(updates: Updates) -> Array:
    """All updates as ``[N, d]``."""
    return torch.cat([(updates.end[n].double() - updates.start[n].double()).flatten(1) for n in updates.end], 1).numpy()


def step(rule: FLTrust, updates: Updates) -> Array:
    """By what the rule moves the shared model, ``[d]``."""
    moved = dataclasses.replace(updates, end=dict(rule.aggregate(updates, 0).adapters))
    return vectors(moved)[0]


def same(found: Array, expected: Array) -> None:
    """Up to the float32 of adapters of size 1."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def reference(updates: Updates) -> Array:
    """The server's update."""
    return torch.cat([(updates.root[n] - updates.start[n][0]).double().flatten() for n in updates.end]).numpy()


def test_it_is_the_papers_equation(updates: Updates) -> None:
    """Clients one by one: the cosine, cut off at 0, and each update at the length of the server's."""
    x, x0 = vectors(updates), reference(updates)
    trust = [max(0.0, float(x_k @ x0) / float(np.linalg.norm(x_k) * np.linalg.norm(x0))) for x_k in x]
    assert 0 < sum(t > 0 for t in trust) < 6  # both kinds are there
    scaled = [t * x_k / np.linalg.norm(x_k) * np.linalg.norm(x0) for t, x_k in zip(trust, x, strict=True)]
    same(step(FLTrust(), updates), np.sum(scaled, axis=0) / sum(trust))
    found = FLTrust().aggregate(updates, 0).per_client["trust"]
    np.testing.assert_allclose(found.numpy(), trust, atol=1e-6)


def test_a_client_of_any_length_counts_like_one_of_the_servers(updates: Updates) -> None:
    expected = step(FLTrust(), updates)
    for name, tensor in updates.end.items():
        tensor[0] = updates.start[name][0] + 1e4 * (tensor[0] - updates.start[name][0])
    np.testing.assert_allclose(step(FLTrust(), updates), expected, atol=1e-4)
    assert np.linalg.norm(step(FLTrust(), updates)) <= np.linalg.norm(reference(updates)) * (1 + 1e-5)


def test_clients_that_move_against_the_server_have_no_effect(updates: Updates) -> None:
    for name, tensor in updates.end.items():
        tensor[3] = updates.start[name][3] - 1e4 * (updates.root[name] - updates.start[name][3])
    rows = [0, 1, 2, 4, 5]
    without = dataclasses.replace(
        updates,
        clients=tuple(updates.clients[row] for row in rows),
        start={n: t[rows] for n, t in updates.start.items()},
        end={n: t[rows] for n, t in updates.end.items()},
        losses=updates.losses[rows],
        num_samples=updates.num_samples[rows],
    )
    assert FLTrust().aggregate(updates, 0).per_client["trust"][3] == 0
    same(step(FLTrust(), updates), step(FLTrust(), without))


@pytest.mark.parametrize("case", ["all against", "no client moves", "the server does not move"])
def test_without_trust_the_model_stays(case: str, updates: Updates) -> None:
    start, root = updates.start, updates.root
    if case == "the server does not move":
        changed = dataclasses.replace(updates, root={n: t[0].clone() for n, t in start.items()})
    else:
        sign = -1 if case == "all against" else 0
        changed = dataclasses.replace(updates, end={n: t + sign * (root[n] - t) for n, t in start.items()})
    assert not step(FLTrust(), changed).any()


def test_what_it_cannot_work_with_is_refused(updates: Updates) -> None:
    (problem,) = FLTrust.limits.problems("fltrust", {"data": {"public_user_rate": 0}})
    assert problem == (
        "aggregation fltrust trains on the public users at the server: data.public_user_rate=0 is not allowed, raise it"
    )
    assert not FLTrust.limits.problems("fltrust", {"data": {"public_user_rate": 0.1}})
    with pytest.raises(TrainingError, match="aggregation fltrust needs what the server trained on the public users"):
        FLTrust().aggregate(dataclasses.replace(updates, root={}), 0)
    updates.start["a"][1] += 1
    with pytest.raises(TrainingError, match="aggregation fltrust needs clients that start a round with the same"):
        FLTrust().aggregate(updates, 0)
