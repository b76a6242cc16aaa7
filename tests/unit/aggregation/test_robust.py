"""Robust rules against NumPy and SciPy, and the laws of robustness.

Known differences from other packages. ByzFL: Krum takes N − f − 1 neighbours and their mean, here N − f − 2 as in the
paper and in Flower; its geometric median stops after three steps from zero with ν = 0.1; its centred clipping refuses
a start; its Clipping and ARC change their inputs. Flower: Multi-Krum weighs the chosen clients by their samples;
Krum takes one neighbour where N is too small for the paper's bound; here that is refused.

Both packages' results are compared in ``test_oracles.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy
import torch
from numpy.typing import NDArray

from fellrec.aggregation import (
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    GeometricMedian,
    Krum,
    MultiKrum,
    NormClipping,
    TrimmedMean,
    Uniform,
)
from fellrec.errors import ConfigError, TrainingError
from fellrec.federated.records import Updates
from fellrec.functional.rng import derive_seed

Make = Callable[..., Updates]
Array = NDArray[np.float64]

RULES = [Bulyan, CenteredClipping, CoordinateMedian, GeometricMedian, Krum, MultiKrum, NormClipping, TrimmedMean]
every_rule = pytest.mark.parametrize("rule", RULES)


def vectors(updates: Updates) -> Array:
    """All updates as ``[N, d]``."""
    parts = [(updates.end[n].double() - updates.start[n].double()).flatten(1) for n in updates.end]
    return torch.cat(parts, dim=1).numpy()


def step(rule: Any, updates: Updates, round_index: int = 0) -> Array:
    """By what a rule moves the shared model, ``[d]``; all clients must get the same."""
    result = rule.aggregate(updates, round_index).adapters
    moved = [(result[n].double() - updates.start[n].double()).flatten(1) for n in updates.end]
    rows = torch.cat(moved, dim=1)
    assert torch.equal(rows, rows[:1].expand_as(rows))
    return rows[0].numpy()


def same(found: Array, expected: Array) -> None:
    """Up to the float32 of adapters of size 1."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def krum_scores(x: Array, f: int) -> list[float]:
    """The sum of the N − f − 2 smallest squared distances of each row, taken one by one."""
    scores = []
    for i in range(len(x)):
        distances = sorted(float(np.sum((x[i] - x[j]) ** 2)) for j in range(len(x)) if j != i)
        scores.append(sum(distances[: max(1, len(x) - f - 2)]))
    return scores


def krum_order(x: Array, f: int) -> list[int]:
    """Rows by their score; without equal ones."""
    return sorted(range(len(x)), key=lambda i: krum_scores(x, f)[i])


@pytest.mark.parametrize("num_clients", [5, 6])
def test_the_median_is_numpys(num_clients: int, make_updates: Make) -> None:
    updates = make_updates(num_clients)
    same(step(CoordinateMedian(), updates), np.median(vectors(updates), axis=0))


@pytest.mark.parametrize("f", [0, 1, 2])
def test_the_trimmed_mean_is_scipys(f: int, make_updates: Make) -> None:
    updates = make_updates(7)
    same(step(TrimmedMean(byzantine=f), updates), scipy.stats.trim_mean(vectors(updates), f / 7 + 1e-9, axis=0))


@pytest.mark.parametrize(("num_clients", "f"), [(5, 1), (9, 3), (4, 0)])
def test_krum_takes_the_update_with_the_nearest_neighbours(num_clients: int, f: int, make_updates: Make) -> None:
    updates = make_updates(num_clients)
    x = vectors(updates)
    same(step(Krum(byzantine=f), updates), x[krum_order(x, f)[0]])
    same(step(MultiKrum(byzantine=f), updates), x[krum_order(x, f)[: num_clients - f]].mean(axis=0))
    same(step(MultiKrum(byzantine=f, num_selected=2), updates), x[krum_order(x, f)[:2]].mean(axis=0))


def test_bulyan_depends_on_no_order_where_two_updates_are_nearest_to_each_other(make_updates: Make) -> None:
    """With f = 1 the last updates are chosen by one distance, which two of them have in common."""
    for seed in range(5):
        updates = make_updates(8, seed)
        backwards = dataclasses.replace(
            updates,
            start={n: t.flip(0) for n, t in updates.start.items()},
            end={n: t.flip(0) for n, t in updates.end.items()},
        )
        for rule in (Bulyan(), MultiKrum(byzantine=0, num_selected=1)):
            same(step(rule, backwards), step(rule, updates))


def test_the_geometric_median_has_the_least_sum_of_distances(make_updates: Make) -> None:
    updates = make_updates(6)
    x = vectors(updates)

    def total(z: Array) -> float:
        return float(np.linalg.norm(x - z, axis=1).sum())

    best = scipy.optimize.minimize(total, x.mean(axis=0), method="BFGS", options={"gtol": 1e-9})
    np.testing.assert_allclose(step(GeometricMedian(), updates), best.x, rtol=0, atol=1e-5)


def test_bulyan_is_krum_again_and_again_and_a_mean_near_the_median(make_updates: Make) -> None:
    updates, f = make_updates(12), 2
    x = vectors(updates)
    left, chosen = krum_order(x, f), []
    while len(chosen) < 12 - 2 * f:
        best = left[int(np.argmin(krum_scores(x[left], f)))]
        left.remove(best)
        chosen.append(best)
    columns = []
    for column in x[chosen].T:
        nearest = sorted(column, key=lambda value: abs(value - np.median(column)))
        columns.append(np.mean(nearest[: 12 - 4 * f]))
    same(step(Bulyan(byzantine=f), updates), np.array(columns))


@pytest.mark.parametrize("max_norm", [0.2, None, 1e9])
def test_norm_clipping_shortens_long_updates(max_norm: float | None, make_updates: Make) -> None:
    updates = make_updates(5)
    x = vectors(updates)
    norms = np.linalg.norm(x, axis=1)
    limit = np.median(norms) if max_norm is None else max_norm
    same(step(NormClipping(max_norm=max_norm), updates), np.mean(x * np.minimum(1, limit / norms)[:, None], axis=0))


@pytest.mark.parametrize("radius", [0.2, None])
def test_centered_clipping_is_the_recursion_of_the_paper(radius: float | None, make_updates: Make) -> None:
    rule, u = CenteredClipping(radius=radius, num_steps=2), np.zeros(11)
    for round_index in range(3):
        updates = make_updates(5, seed=round_index)
        x = vectors(updates)
        for _ in range(2):
            norms = np.linalg.norm(x - u, axis=1)
            limit = np.median(norms) if radius is None else radius
            u = u + np.mean((x - u) * np.minimum(1, limit / norms)[:, None], axis=0)
        same(step(rule, updates, round_index), u)


def nearest_mixing(x: Array, f: int) -> Array:
    """The mean of the N − f nearest of each row, itself among them."""
    order = [sorted(range(len(x)), key=lambda j: np.linalg.norm(x[i] - x[j])) for i in range(len(x))]
    return np.array([x[nearest[: len(x) - f]].mean(axis=0) for nearest in order])


def clipped(x: Array, f: int) -> Array:
    """The ⌊2f(N − f)/N⌋ longest rows shortened to the longest of the others."""
    norms = np.linalg.norm(x, axis=1)
    limit = np.sort(norms)[: len(x) - (2 * f * (len(x) - f)) // len(x)][-1]
    return x * np.minimum(1, limit / norms)[:, None]


def test_steps_before_a_rule(make_updates: Make) -> None:
    updates = make_updates(7)
    x = vectors(updates)
    same(step(CoordinateMedian(byzantine=2, before=["nnm"]), updates), np.median(nearest_mixing(x, 2), axis=0))
    same(step(CoordinateMedian(byzantine=2, before=["arc"]), updates), np.median(clipped(x, 2), axis=0))
    both = nearest_mixing(clipped(x, 2), 2)
    same(step(MultiKrum(byzantine=2, before=["arc", "nnm"]), updates), both[krum_order(both, 2)[:5]].mean(axis=0))
    # The mean of means of unequal groups is not the plain mean: 7 clients are groups of 3, 3 and 1.
    order = sorted(range(7), key=lambda row: derive_seed(5, "buckets", 3, updates.clients[row]))
    groups = np.array([x[order[:3]].mean(axis=0), x[order[3:6]].mean(axis=0), x[order[6]]])
    rule = TrimmedMean(byzantine=1, before=["bucketing"], bucket_size=3, bucket_seed=5)
    same(step(rule, updates, round_index=3), np.median(groups, axis=0))


@pytest.mark.parametrize("rule", [MultiKrum(byzantine=0), TrimmedMean(byzantine=0), NormClipping(max_norm=1e6)])
def test_without_byzantine_clients_or_a_limit_it_is_the_plain_mean(rule: Any, make_updates: Make) -> None:
    updates = make_updates(5)
    same(step(rule, updates), step(Uniform(), updates))


@pytest.mark.parametrize("before", [[], ["nnm"], ["arc", "nnm"]])
@every_rule
def test_one_client_far_away_moves_the_result_no_further_than_the_others_are_apart(
    rule: Any, before: list[str], make_updates: Make
) -> None:
    updates = make_updates(7)
    x = vectors(updates)
    spread = max(np.linalg.norm(a - b) for a in [*x, 0 * x[0]] for b in x)
    expected = step(rule(before=before), updates)
    for name, tensor in updates.end.items():
        updates.end[name][3] = tensor[3] + 1e6
    assert np.linalg.norm(step(rule(before=before), updates) - expected) <= spread


@every_rule
def test_updates_of_zero_leave_the_model_where_it_is(rule: Any, make_updates: Make) -> None:
    updates = make_updates(7)
    still = dataclasses.replace(updates, end={n: t.clone() for n, t in updates.start.items()})
    for before in ([], ["nnm", "arc"]):
        assert not step(rule(before=before), still).any()


LEAST = {Bulyan: 7, Krum: 5, MultiKrum: 5}


@every_rule
def test_too_few_clients_are_refused_before_and_while_it_runs(rule: Any, make_updates: Make) -> None:
    least = LEAST.get(rule, 3)
    made = rule()
    config = {"partition": {"num_clients": least - 1}}
    (problem,) = made.limits.problems(made.name, config)
    needed = (
        f"aggregation {made.name} with byzantine=1 needs at least {least} clients in a round: partition.num_clients"
    )
    assert problem.startswith(needed)
    assert not made.limits.problems(made.name, {"partition": {"num_clients": least}})
    with pytest.raises(
        TrainingError, match=rf"aggregation {made.name} with byzantine=1 needs at least {least} clients"
    ):
        made.aggregate(make_updates(least - 1), 0)
    made.aggregate(make_updates(least), 0)
    assert rule(before=["bucketing"], bucket_size=3).limits.least_clients == 3 * (least - 1) + 1


def test_more_selected_than_there_are_is_refused(make_updates: Make) -> None:
    with pytest.raises(TrainingError, match="multi_krum with byzantine=1 needs at least 6 clients"):
        MultiKrum(num_selected=5).aggregate(make_updates(5), 0)


@pytest.mark.parametrize(
    ("rule", "setting", "message"),
    [
        (Krum, {"byzantine": -1}, "aggregation.byzantine=-1 is not allowed: a whole number of at least 0"),
        (TrimmedMean, {"byzantine": 0.2}, "aggregation.byzantine=0.2 is not allowed: a whole number of at least 0"),
        (CoordinateMedian, {"before": ["nmn"]}, "before=\\['nmn'\\] is not allowed: a list, each once, of nnm, bucket"),
        (NormClipping, {"max_norm": 0.0}, "max_norm=0.0 is not allowed: a number above 0, or null"),
        (CenteredClipping, {"radius": -1.0}, "radius=-1.0 is not allowed: a number above 0, or null"),
        (Bulyan, {"bucket_size": 0}, "bucket_size=0 is not allowed: a whole number of at least 1"),
    ],
)
def test_bad_settings_are_refused(rule: Any, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule(**setting)


@every_rule
def test_different_starts_are_refused_by_name(rule: Any, make_updates: Make) -> None:
    updates = make_updates(7)
    updates.start["a"][1] += 1
    with pytest.raises(TrainingError, match=rf"aggregation {rule().name} needs clients that start a round with the sa"):
        rule().aggregate(updates, 0)


def test_the_last_step_goes_through_a_checkpoint(make_updates: Make) -> None:
    whole, first, second = CenteredClipping(), CenteredClipping(), CenteredClipping()
    whole.aggregate(make_updates(seed=1), 0)
    first.aggregate(make_updates(seed=1), 0)
    second.load_state_dict(first.state_dict())
    updates = make_updates(seed=2)
    assert np.array_equal(step(whole, updates, 1), step(second, updates, 1))
    assert not np.array_equal(step(CenteredClipping(), updates, 1), step(second, updates, 1))
