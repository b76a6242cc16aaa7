"""Mixing updates against its equations, written out in NumPy, and against the rules that it becomes at its ends."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from fellrec.aggregation import FELLRec, Uniform, UpdateMixing
from fellrec.errors import ConfigError
from fellrec.federated.records import Updates

MakeUpdates = Callable[..., Updates]


def rows(stack: Mapping[str, torch.Tensor]) -> np.ndarray:
    """Each client's adapter as one vector, ``[N, parameters]``."""
    return np.concatenate([part.double().numpy().reshape(len(part), -1) for part in stack.values()], axis=1)


def apart(updates: Updates, seed: int = 1) -> Updates:
    """The same updates from starts that differ."""
    generator = torch.Generator().manual_seed(seed)
    shift = {name: torch.randn(part.shape, generator=generator) for name, part in updates.start.items()}
    start = {name: part + shift[name] for name, part in updates.start.items()}
    end = {name: part + shift[name] for name, part in updates.end.items()}
    return Updates(updates.clients, start, end, updates.losses, updates.num_samples)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize(("own_share", "rate"), [(0.0, 1.0), (0.3, 1.5), (1.0, 0.5)])
def test_every_client_moves_by_the_equations(
    attention: bool, own_share: float, rate: float, make_updates: MakeUpdates
) -> None:
    updates = apart(make_updates(4))
    start, end = rows(updates.start), rows(updates.end)
    expected = np.empty_like(start)
    for c in range(4):
        similarity = []
        for n in range(4):
            mine, theirs = end[c] - start[c], end[n] - start[n]
            cosine = mine @ theirs / np.linalg.norm(mine) / np.linalg.norm(theirs)
            similarity.append((1 + cosine) / 2 if attention else 1.0)
        average = sum(s * (end[n] - start[n]) for n, s in enumerate(similarity)) / sum(similarity)
        expected[c] = start[c] + rate * ((1 - own_share) * average + own_share * (end[c] - start[c]))
    result = UpdateMixing(own_share, rate, attention=attention).aggregate(updates, 3)
    np.testing.assert_allclose(rows(result.adapters), expected, rtol=1e-5, atol=1e-6)
    assert set(result.matrices) == {"mixing", "similarity"}


def test_from_equal_starts_it_is_the_mean_that_fellrec_gives_without_heating(make_updates: MakeUpdates) -> None:
    updates = make_updates(5)
    for attention, other in ((True, FELLRec(heating=False)), (False, Uniform())):
        result, expected = (rule.aggregate(updates, 0) for rule in (UpdateMixing(0.0, attention=attention), other))
        torch.testing.assert_close(result.matrices["mixing"], expected.matrices["mixing"])
        np.testing.assert_allclose(rows(result.adapters), rows(expected.adapters), rtol=1e-6, atol=1e-7)


def test_with_nothing_but_its_own_share_it_is_local_training(make_updates: MakeUpdates) -> None:
    updates = apart(make_updates(3))
    result = UpdateMixing(1.0).aggregate(updates, 0).adapters
    np.testing.assert_allclose(rows(result), rows(updates.end), rtol=1e-6)


def test_what_sets_clients_apart_stays(make_updates: MakeUpdates) -> None:
    """Equal updates from different starts: everybody gets just that update, and the distances are as before."""
    updates = make_updates(3)
    step = {name: part.new_ones(part.shape) for name, part in updates.start.items()}
    start = apart(updates).start
    given = Updates(
        updates.clients, start, {name: start[name] + step[name] for name in step}, updates.losses, updates.num_samples
    )
    np.testing.assert_allclose(rows(UpdateMixing().aggregate(given, 0).adapters), rows(start) + 1, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"own_share": -0.1}, "aggregation.own_share=-0.1 is not allowed: a number in .0, 1."),
        ({"own_share": 1.1}, "aggregation.own_share=1.1 is not allowed"),
        ({"server_learning_rate": 0}, "aggregation.server_learning_rate=0 is not allowed: a number above 0"),
        ({"attention": "yes"}, "aggregation.attention=yes is not allowed: true or false"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        UpdateMixing(**settings)  # type: ignore[arg-type]
