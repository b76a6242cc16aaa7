"""Fair rules against NumPy and SciPy, and their laws.

Known differences from other packages. Flower's and the authors' q-FedAvg have L = 1 / learning rate, here it is a
setting. FLGo's FedMGDA+ steps by η_s itself (``step_length=fixed``). FLGo's FedFV takes this round's own clients for
τ = 1, and divides by a norm of 0. The authors' FedHEAL counts rounds that a client missed. The authors' AFL
takes gradients of one batch and no local training.

Flower's q-FedAvg and quadprog's weights of FedMGDA+ are in ``test_oracles.py``. The conditions of the optimum, tested
here, need no package.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy
import torch
from fakes import fake_loop, resumed
from numpy.typing import NDArray

from fellrec.aggregation import AFL, TERM, FedAvg, FedFV, FedHEAL, FedMGDA, QFedAvg, Uniform
from fellrec.errors import ConfigError, TrainingError
from fellrec.federated.records import Updates
from fellrec.functional.fairness import least_norm_weights, project_to_simplex

Array = NDArray[np.float64]
Make = Callable[..., Updates]

RULES = [AFL, FedFV, FedHEAL, FedMGDA, QFedAvg, TERM]
every_rule = pytest.mark.parametrize("rule", RULES)


@pytest.fixture
def make(make_updates: Make) -> Make:
    """Updates with losses at the received adapters, of clients that can be chosen."""

    def made(num_clients: int = 4, seed: int = 0, losses: Any = None, clients: Any = None, total: int = 0) -> Updates:
        updates = make_updates(num_clients, seed)
        start = 3 * torch.rand(num_clients, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        start = start if losses is None else torch.tensor(losses, dtype=torch.float64)
        return dataclasses.replace(
            updates, start_losses=start, clients=tuple(clients or range(num_clients)), num_clients=total
        )

    return made


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


def losses_of(updates: Updates) -> Array:
    assert updates.start_losses is not None
    return updates.start_losses.numpy()


def opposite(make: Make, **how: Any) -> Updates:
    """Two clients with opposite updates."""
    updates = make(2, **how)
    for name, tensor in updates.end.items():
        tensor[1] = 2 * updates.start[name][0] - tensor[0]
    return updates


@pytest.mark.parametrize(("q", "lipschitz"), [(0.1, 1.0), (1.0, 3.0), (5.0, 10.0)])
def test_qfedavg_is_algorithm_2_of_the_paper(q: float, lipschitz: float, make: Make) -> None:
    updates = make(5)
    gradients, losses = -lipschitz * vectors(updates), losses_of(updates) + 1e-10
    deltas = losses[:, None] ** q * gradients
    h = q * losses ** (q - 1) * np.sum(gradients**2, axis=1) + lipschitz * losses**q
    same(step(QFedAvg(q=q, lipschitz=lipschitz), updates), -deltas.sum(axis=0) / h.sum())


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        (QFedAvg(q=0.0), Uniform()),
        (TERM(tilt=0.0), FedAvg()),
        (TERM(tilt=0.0, weights="equal"), Uniform()),
        (AFL(gamma=0.0), Uniform()),
    ],
)
def test_rules_that_treat_all_alike_are_the_mean(rule: Any, reference: Any, make: Make) -> None:
    for seed in (0, 1):
        updates = make(5, seed)
        same(step(rule, updates, seed), step(reference, updates))


def test_term_weighs_by_the_exponential_of_the_loss(make: Make) -> None:
    updates = make(5)
    shares = updates.num_samples.numpy() / float(updates.num_samples.sum())
    weights = shares * np.exp(1.5 * losses_of(updates))
    same(step(TERM(tilt=1.5), updates), weights @ vectors(updates) / weights.sum())
    worst = int(losses_of(updates).argmax())
    same(step(TERM(tilt=1e6), updates), vectors(updates)[worst])
    same(step(TERM(tilt=-1e6), updates), vectors(updates)[int(losses_of(updates).argmin())])


def test_the_scale_of_losses_counts_in_qfedavg_and_is_the_tilt_in_term(make: Make) -> None:
    updates = make(5)
    scaled = make(5, losses=(10 * losses_of(updates)).tolist())
    same(step(TERM(tilt=0.1), scaled), step(TERM(tilt=1.0), updates))
    assert np.abs(step(QFedAvg(), scaled) - step(QFedAvg(), updates)).max() > 1e-3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("total", [1.0, 0.3, 0.0])
def test_the_projection_on_the_simplex_is_the_nearest_point(seed: int, total: float) -> None:
    values = np.random.default_rng(seed).normal(size=6)
    found = project_to_simplex(torch.from_numpy(values), total).numpy()
    nearest = scipy.optimize.minimize(
        lambda x: np.sum((x - values) ** 2),
        np.full(6, total / 6),
        method="SLSQP",
        bounds=[(0, None)] * 6,
        constraints={"type": "eq", "fun": lambda x: x.sum() - total},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(found, nearest.x, rtol=0, atol=1e-6)
    assert abs(found.sum() - total) < 1e-12


def gram_of(seed: int, num_clients: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inner products of unit vectors, singular where ``size < num_clients``, and shares of clients."""
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(num_clients, size)) + 0.3
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    shares = generator.random(num_clients)
    return torch.from_numpy(x @ x.T), torch.from_numpy(shares / shares.sum())


@pytest.mark.parametrize("epsilon", [0.05, 0.1, 1.0])
@pytest.mark.parametrize(("num_clients", "size"), [(2, 3), (5, 50), (12, 4), (60, 500)])
def test_the_weights_of_fedmgda_satisfy_the_conditions_of_the_optimum(
    num_clients: int, size: int, epsilon: float
) -> None:
    """Karush, Kuhn and Tucker: no weight that may rise has a smaller gradient than one that may fall."""
    for seed in range(4):
        gram, shares = gram_of(seed, num_clients, size)
        found = least_norm_weights(gram, shares, epsilon)
        lower, upper = (shares - epsilon).clamp_min(0), (shares + epsilon).clamp_max(1)
        assert abs(float(found.sum()) - 1) < 1e-9
        assert bool(((found >= lower - 1e-12) & (found <= upper + 1e-12)).all())
        gradient = gram @ found + 1e-8 * (found - shares)
        may_rise, may_fall = gradient[found < upper - 1e-12], gradient[found > lower + 1e-12]
        assert float(may_fall.max() - may_rise.min()) < 1e-9


def test_the_weights_of_fedmgda_are_scipys() -> None:
    gram, shares = gram_of(7, 8, 20)
    found = least_norm_weights(gram, shares, 0.1).numpy()
    best = scipy.optimize.minimize(
        lambda x: x @ gram.numpy() @ x,
        shares.numpy(),
        jac=lambda x: 2 * gram.numpy() @ x,
        method="SLSQP",
        bounds=[(max(0, p - 0.1), min(1, p + 0.1)) for p in shares.tolist()],
        constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
        options={"ftol": 1e-15, "maxiter": 500},
    )
    np.testing.assert_allclose(found, best.x, rtol=0, atol=1e-5)


def test_fedmgda_steps_along_the_weighted_unit_updates(make: Make) -> None:
    updates = make(5)
    x, shares = vectors(updates), updates.num_samples.numpy() / float(updates.num_samples.sum())
    norms = np.linalg.norm(x, axis=1)
    fixed = shares @ (x / norms[:, None])
    same(step(FedMGDA(epsilon=0.0, step_length="fixed", server_learning_rate=0.5), updates), 0.5 * fixed)
    same(step(FedMGDA(epsilon=0.0), updates), (shares @ norms) * fixed)
    free = step(FedMGDA(epsilon=1.0), updates)
    assert (x @ free > -1e-6).all()
    assert np.linalg.norm(free) < np.linalg.norm(step(FedMGDA(epsilon=0.0), updates))


def test_opposite_updates_leave_the_model_where_it_is(make: Make) -> None:
    updates = opposite(make)
    same(step(FedMGDA(epsilon=1.0), updates), np.zeros(11))
    same(step(FedFV(alpha=0.0), updates), np.zeros(11))
    same(step(FedFV(), updates), np.zeros(11))


def fedfv(g: Array, losses: Array, alpha: float, past: list[list[Array]]) -> Array:
    """The algorithm of the paper, vector by vector; ``past`` has the absent clients' updates, oldest round first."""
    order = sorted(range(len(g)), key=lambda i: losses[i])
    kept = order[math.ceil((len(g) - 1) * (1 - alpha)) :] if alpha > 0 else []
    projected = [v.copy() for v in g]
    for i, j in itertools.product(range(len(g)), order):
        if i not in kept and i != j and projected[i] @ g[j] < 0:
            projected[i] -= (projected[i] @ g[j]) / (g[j] @ g[j]) * g[j]
    mean = np.mean(projected, axis=0)
    for group in past:
        conflicting = [v for v in group if v @ mean < 0]
        if conflicting:
            total = np.sum(conflicting, axis=0)
            mean = mean - (mean @ total) / (total @ total) * total
    return mean / np.linalg.norm(mean) * np.linalg.norm(g.mean(axis=0))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5, 1.0])
def test_fedfv_projects_conflicts_away(alpha: float, make: Make) -> None:
    for seed in range(4):
        updates = make(6, seed)
        x = vectors(updates)
        same(step(FedFV(alpha=alpha), updates), fedfv(x, losses_of(updates), alpha, []))
    if alpha == 1.0:
        same(step(FedFV(alpha=alpha), updates), x.mean(axis=0))


def test_without_freedom_or_conflicts_it_is_the_mean(make: Make) -> None:
    """Updates of one length with entries of one sign: FedMGDA+ with ε = 0 is FedAvg, FedFV the plain mean."""
    updates = make(5)
    x = np.abs(vectors(updates))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    place = 0
    for name, start in updates.start.items():
        size = start[0].numel()
        updates.end[name] = start + torch.from_numpy(x[:, place : place + size]).float().reshape(start.shape)
        place += size
    same(step(FedMGDA(epsilon=0.0), updates), step(FedAvg(), updates))
    same(step(FedFV(), updates), step(Uniform(), updates))


def test_fedfv_avoids_conflicts_with_absent_clients_of_the_last_rounds(make: Make) -> None:
    rule = FedFV(tau=2)
    seen: dict[int, tuple[int, Array]] = {}
    cohorts = [(0, 1, 2), (2, 3, 4), (0, 5, 6), (5, 6, 7), (1, 2, 3)]
    num_past = []
    for round_index, clients in enumerate(cohorts):
        updates = make(3, seed=round_index, clients=clients, total=8)
        x = vectors(updates)
        rounds = range(round_index - 2, round_index)
        past = [[v for c, (last, v) in seen.items() if last == r and c not in clients] for r in rounds]
        num_past.append(sum(map(len, past)))
        same(step(rule, updates, round_index), fedfv(x, losses_of(updates), 0.1, past))
        seen |= {client: (round_index, vector) for client, vector in zip(clients, x)}
    assert num_past == [0, 2, 4, 4, 4]
    assert set(rule.state_dict()["past"]) == {"0", "1", "2", "3", "5", "6", "7"}


def test_fedfv_remembers_nothing_where_nobody_is_absent(make: Make) -> None:
    rule = FedFV()
    rule.aggregate(make(4, total=4), 0)
    assert rule.state_dict() == {"past": {}, "rounds": {}}


def test_afl_is_stochastic_mirror_descent_of_the_paper(make: Make) -> None:
    rule, weights = AFL(gamma=0.2, server_learning_rate=0.5), np.full(4, 0.25)
    for seed in range(3):
        updates = make(4, seed)
        result = rule.aggregate(updates, seed)
        moved = (result.adapters["b"][0].double() - updates.start["b"][0].double()).numpy()
        change = (updates.end["b"].double() - updates.start["b"].double()).numpy()
        same(moved, 0.5 * weights @ change)
        weights = weights + 0.2 * losses_of(updates)
        descending = np.sort(weights)[::-1]
        levels = (1 - np.cumsum(descending)) / np.arange(1, 5)
        weights = np.maximum(weights + levels[np.nonzero(descending + levels > 0)[0][-1]], 0)
        np.testing.assert_allclose(result.per_client["lambda"].numpy(), weights, rtol=0, atol=1e-12)


def test_equal_losses_leave_afls_weights_as_they_are_and_absent_clients_keep_theirs(make: Make) -> None:
    rule = AFL(gamma=0.1)
    before = rule.aggregate(make(4, losses=[1.0, 2.0, 3.0, 0.0], total=4), 0).per_client["lambda"]
    after = rule.aggregate(make(4, losses=[7.0] * 4, total=4), 1).per_client["lambda"]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12)
    rule.aggregate(make(2, losses=[0.0, 9.0], clients=(0, 1), total=4), 2)
    weights = rule.state_dict()["weights"]
    assert [weights["2"], weights["3"]] == pytest.approx(after[2:].tolist())
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["1"] > float(after[1])


def test_afl_serves_the_mean_of_all_rounds(tmp_path: Path) -> None:
    """Clients add row + 1, and all losses are 2: w moves by 2.5 a round, to 2.5, 5 and 7.5, whose mean is 5."""
    loop = fake_loop(AFL(), num_rounds=3)
    loop.run()
    served = [job.adapter.tensors()["a"].tolist() for job in loop.population.score_jobs()]
    assert served == [[5.0, 5.0]]
    assert loop.population.job(0, 3).adapter.tensors()["a"].tolist() == [7.5, 7.5]
    first = fake_loop(AFL(), num_rounds=2)
    first.run()
    second = resumed(first, tmp_path, rule=AFL(), num_rounds=3)
    second.run()
    assert [job.adapter.tensors()["a"].tolist() for job in second.population.score_jobs()] == served


def fedheal(rounds: list[list[Array]], threshold: float, beta: float) -> list[Array]:
    """The authors' program for clients that are never absent: lists of parameters ``[N, d]`` → steps ``[d]``."""
    num_clients, steps = len(rounds[0][0]), []
    ups: list[list[Array]] = []
    growth, weights = np.zeros(num_clients), np.full(num_clients, 1 / num_clients)
    for parameters in rounds:
        masks = []
        for place, update in enumerate(parameters):
            directions = [(update >= 0) == (past[place] >= 0) for past in ups]
            masks.append(np.mean(directions, axis=0) > threshold if ups else np.ones_like(update, dtype=bool))
        distance = sum(np.linalg.norm(update * mask, axis=1) for update, mask in zip(parameters, masks))
        growth = (1 - beta) * growth + beta * distance / distance.sum()
        weights = weights + growth
        entries = []
        for update, mask in zip(parameters, masks):
            total = (weights[:, None] * mask).sum(axis=0)
            entries.append((weights[:, None] * mask * update).sum(axis=0) / np.where(total > 0, total, 1))
        steps.append(np.concatenate(entries))
        ups.append(parameters)
    return steps


@pytest.mark.parametrize(("threshold", "beta"), [(0.3, 0.4), (0.7, 1.0)])
def test_fedheal_is_the_authors_program(threshold: float, beta: float, make: Make) -> None:
    all_updates = [make(3, seed) for seed in range(5)]
    rounds = [[(u.end[n].double() - u.start[n].double()).flatten(1).numpy() for n in u.end] for u in all_updates]
    rule = FedHEAL(threshold=threshold, beta=beta)
    for round_index, expected in enumerate(fedheal(rounds, threshold, beta)):
        same(step(rule, all_updates[round_index], round_index), expected)


def test_fedheal_counts_a_clients_own_rounds(make: Make) -> None:
    """A client that joins late is masked by nothing, and one that was away by its own rounds only."""
    rule, alone = FedHEAL(), FedHEAL()
    rule.aggregate(make(2, 0, clients=(0, 1)), 0)
    rule.aggregate(make(1, 1, clients=(5,)), 1)
    assert rule.state_dict()["num_rounds"] == {"0": 1, "1": 1, "5": 1}
    late = make(1, 2, clients=(7,))
    same(step(rule, late, 2), step(alone, late, 0))
    first = make(5)
    same(step(FedHEAL(beta=0.0), first), step(Uniform(), first))


@every_rule
def test_losses_and_updates_of_zero_are_defined(rule: Any, make: Make) -> None:
    for losses in ([0.0] * 4, [0.0, 0.0, 2.0, 2.0], None):
        updates = make(4, losses=losses)
        assert np.isfinite(step(rule(), updates)).all()
        still = dataclasses.replace(updates, end={n: t.clone() for n, t in updates.start.items()})
        made = rule()
        for round_index in range(2):
            assert not step(made, still, round_index).any()
    one = make(1, losses=[0.0])
    assert np.isfinite(step(rule(), one)).all()


@pytest.mark.parametrize("rule", [AFL, FedFV, QFedAvg, TERM])
def test_losses_at_the_received_adapter_are_asked_for_and_checked(rule: Any, make: Make) -> None:
    assert rule.needs_start_loss
    for losses, message in ((None, "needs the clients' losses"), ([1.0, math.nan, 1.0, 1.0], "needed are finite")):
        wrong = None if losses is None else torch.tensor(losses, dtype=torch.float64)
        with pytest.raises(TrainingError, match=f"aggregation {rule().name}.*{message}"):
            rule().aggregate(dataclasses.replace(make(4), start_losses=wrong), 0)


@every_rule
def test_different_starts_are_refused_by_name(rule: Any, make: Make) -> None:
    updates = make(4)
    updates.start["a"][1] += 1
    with pytest.raises(TrainingError, match=rf"aggregation {rule().name} needs clients that start a round with the sa"):
        rule().aggregate(updates, 0)


@pytest.mark.parametrize(
    ("rule", "setting", "message"),
    [
        (QFedAvg, {"q": -1.0}, "aggregation.q=-1.0 is not allowed: a number of at least 0"),
        (QFedAvg, {"lipschitz": 0.0}, "aggregation.lipschitz=0.0 is not allowed: a number above 0"),
        (AFL, {"gamma": -0.1}, "aggregation.gamma=-0.1 is not allowed: a number of at least 0"),
        (FedMGDA, {"epsilon": 1.5}, "aggregation.epsilon=1.5 is not allowed: a number in \\[0, 1\\]"),
        (FedMGDA, {"step_length": "unit"}, "aggregation.step_length=unit is not allowed: mean_norm or fixed"),
        (FedFV, {"tau": -1}, "aggregation.tau=-1 is not allowed: a whole number of at least 0"),
        (TERM, {"tilt": math.inf}, "aggregation.tilt=inf is not allowed: a number"),
        (FedHEAL, {"threshold": 2.0}, "aggregation.threshold=2.0 is not allowed: a number in \\[0, 1\\]"),
    ],
)
def test_bad_settings_are_refused(rule: Any, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rule(**setting)


def test_afl_refuses_cohorts_before_anything_is_loaded() -> None:
    (problem,) = AFL().limits.problems("afl", {"participation": {"rate": 0.5}})
    assert problem.startswith("aggregation afl needs every client in every round")


@pytest.mark.parametrize("rule", [AFL, FedFV, FedHEAL])
def test_state_goes_through_a_checkpoint_in_the_middle_of_a_run(rule: Any, make: Make, tmp_path: Path) -> None:
    whole, first, second = rule(), rule(), rule()
    for made in (whole, first):
        made.aggregate(make(3, 1, clients=(0, 1, 2), total=5), 0)
    second.load_state_dict(first.state_dict())
    updates = make(3, 2, clients=(1, 2, 4), total=5)
    assert np.array_equal(step(whole, updates, 1), step(second, updates, 1))
    assert not np.array_equal(step(rule(), updates, 1), step(second, updates, 1))
    loop = fake_loop(rule(), num_rounds=3)
    loop.run()
    part = fake_loop(rule(), num_rounds=2)
    part.run()
    rest = resumed(part, tmp_path, rule=rule(), num_rounds=3)
    rest.run()
    assert [v.tensors()["a"].tolist() for v in rest.population.bank.versions] == [
        v.tensors()["a"].tolist() for v in loop.population.bank.versions
    ]
