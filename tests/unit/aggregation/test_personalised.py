"""Ditto, FedPer, FedAMP, pFedMe and CFL: rounds on quadratic losses, repeated in NumPy, and laws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import fake_loop, resumed
from quadratic import CURVATURES, RATE, SAMPLES, STEPS, TARGETS, QuadraticExecutor
from torch import nn

from fellrec.aggregation import CFL, IFCA, Ditto, FedAMP, FedFomo, FedPer, FedRep, PFedMe
from fellrec.errors import ConfigError, TrainingError
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.records import Updates
from fellrec.federated.slot import LocalSlot
from fellrec.federated.slot_state import SlotState, new_parameters
from fellrec.functional.attention import first_order_weights, message_passing, squared_distances
from fellrec.functional.clusters import bipartition, is_divided
from fellrec.functional.mixing import gram_matrix
from fellrec.functional.participation import cohort
from fellrec.state.tensor_store import StoredTensors

Make = Callable[..., Updates]
T, H = np.array(TARGETS), CURVATURES
P = np.array(SAMPLES) / sum(SAMPLES)


def quadratic_loop(rule: Any, **how: Any) -> FederatedLoop:
    return fake_loop(rule, QuadraticExecutor(rule), num_clients=3, **how)


def trained(start: np.ndarray, k: int, pull: float = 0.0, anchor: Any = 0.0, steps: int | None = None) -> np.ndarray:
    """SGD on client k's loss plus ``pull / 2 ‖v − anchor‖²``."""
    v = start.copy()
    for _ in range(STEPS[k] if steps is None else steps):
        v = v - RATE * (H[k] * (v - T[k]) + pull * (v - anchor))
    return v


def row(loop: FederatedLoop, index: int, name: str = "a") -> np.ndarray:
    return loop.population.bank.row(index)[name].numpy()


def test_ditto_trains_a_shared_and_a_personal_model() -> None:
    """Personal models of absent clients stay; the anchor is the shared model that a client received."""
    how = {"participation": {"rate": 0.6}, "num_rounds": 4}
    loop = quadratic_loop(Ditto(lam=0.5), **how)
    loop.run()
    w, v = np.zeros(2), np.zeros((3, 2))
    for round_index in range(4):
        clients = list(cohort(3, 0.6, 0, round_index))
        ends = np.stack([trained(w, k) for k in clients])
        for k in clients:
            v[k] = trained(v[k], k, 0.5, w)
        w = np.average(ends, axis=0, weights=P[clients])
    for k in range(3):
        np.testing.assert_allclose(row(loop, k), w, rtol=0, atol=1e-6)
        np.testing.assert_allclose(row(loop, 3 + k, "b"), v[k], rtol=0, atol=1e-6)


def test_ditto_without_a_pull_is_local_training_and_serves_it() -> None:
    loop = quadratic_loop(Ditto(lam=0.0), num_rounds=2)
    result = loop.run()
    for k in range(3):
        expected = trained(trained(np.zeros(2), k), k)
        np.testing.assert_allclose(result.served[k].tensors()["a"], expected, rtol=0, atol=1e-6)


def named(rule: Any, personal: str = "b") -> Any:
    """A rule whose model has parameter ``personal`` in its tail."""
    rule.part_of = lambda name: "tail" if name == personal else "body"
    return rule


def test_fedper_averages_the_shared_part_only() -> None:
    loop = quadratic_loop(named(FedPer()), num_rounds=2)
    loop.run()
    w, v = np.zeros(2), np.zeros((3, 2))
    for _ in range(2):
        w = P @ np.stack([trained(w, k) for k in range(3)])
        v = np.stack([trained(v[k], k) for k in range(3)])
    for k in range(3):
        np.testing.assert_allclose(row(loop, k, "a"), w, rtol=0, atol=1e-6)
        np.testing.assert_allclose(row(loop, k, "b"), v[k], rtol=0, atol=1e-6)
    assert loop.exchange.ledger.total(round=0, direction="up", kind="adapter") == 3 * 8


@pytest.mark.parametrize(("share", "first"), [(0.5, [2, 2, 2]), (0.01, [1, 1, 1]), (0.99, [2, 4, 3])])
def test_fedrep_trains_the_personal_part_first(share: float, first: list[int]) -> None:
    """With 3, 5 and 4 steps, of which each part has at least one; the part that waits does not move at all."""
    loop = quadratic_loop(named(FedRep(personal_share=share)), num_rounds=2)
    loop.run()
    w, v = np.zeros(2), np.zeros((3, 2))
    for _ in range(2):
        v = np.stack([trained(v[k], k, steps=first[k]) for k in range(3)])
        w = P @ np.stack([trained(w, k, steps=STEPS[k] - first[k]) for k in range(3)])
    for k in range(3):
        np.testing.assert_allclose(row(loop, k, "a"), w, rtol=0, atol=1e-6)
        np.testing.assert_allclose(row(loop, k, "b"), v[k], rtol=0, atol=1e-6)


def test_a_part_that_is_not_trained_in_a_step_keeps_its_moments() -> None:
    """AdamW with decay: no step, no decay, no count; a round of one step trains both parts."""
    rule = named(FedRep())
    for total, moved in ((2, {"b"}), (1, {"a", "b"})):
        begin = SlotState({"a": torch.ones(2), "b": torch.ones(2)}, total_steps=total)
        parameters = new_parameters({name: nn.Parameter(t) for name, t in begin.adapter.items()}, begin)
        slot = LocalSlot(parameters, begin, torch.optim.AdamW(list(parameters.values())), rule.local_terms)
        torch.stack([value.sum() for value in parameters.values()]).sum().backward()
        assert set(slot.norms()) == moved
        slot.step(1.0, 0.1)
        state = slot.state()
        assert {name for name, t in state.adapter.items() if not torch.equal(t, torch.ones(2))} == moved
        assert {key.partition("|")[0] for key in state.optimizer} == moved


def test_what_is_personal() -> None:
    """By part, factor or layer."""
    names = ["h.0.lora_A.default.weight", "h.0.lora_B.default.weight", "h.11.lora_A.default.weight", "norm.weight"]
    found = {}
    for personal in ("tail", "b", [11, 3]):
        rule = FedPer(personal=personal)
        rule.part_of = lambda name: "tail" if "11" in name or "norm" in name else "head"
        found[str(personal)] = [rule.is_personal(name) for name in names]
        rule.begin(dict.fromkeys(names, torch.zeros(1)))
    assert found == {
        "tail": [False, False, True, True],
        "b": [False, True, False, False],
        "[11, 3]": [False, False, True, False],
    }


@pytest.mark.parametrize(("personal", "which"), [([7], "none"), ([0], "all")])
def test_a_personal_part_that_is_nothing_or_everything_is_refused(personal: list[int], which: str) -> None:
    with pytest.raises(ConfigError, match=rf"aggregation fedper: .*{which} of the adapter's 2 parameters are personal"):
        FedPer(personal=personal).begin({"h.0.a": torch.zeros(1), "h.0.b": torch.zeros(1)})


@pytest.mark.parametrize("personal", ["head", [], [-1], [1, 1], 3])
def test_an_unknown_part_is_refused(personal: Any) -> None:
    with pytest.raises(ConfigError, match=r"aggregation.personal=.* is not allowed: tail or b, or a list of numbers"):
        FedPer(personal=personal)


def test_fedamp_pulls_every_client_towards_its_mixture(tmp_path: Path) -> None:
    """The formula in NumPy, over both parameters, which are equal; stopped after two rounds."""
    how: dict[str, Any] = {"num_rounds": 4}
    first = quadratic_loop(FedAMP(mu=0.5, attention=0.8, sigma=2.0), num_rounds=2)
    first.run()
    rule = FedAMP(mu=0.5, attention=0.8, sigma=2.0)
    loop = resumed(first, tmp_path, rule=rule, executor=QuadraticExecutor(rule), num_clients=3, **how)
    loop.run()
    w, u = np.zeros((3, 2)), None
    for _ in range(4):
        w = np.stack([trained(w[k], k, 0.0 if u is None else 0.5, 0.0 if u is None else u[k]) for k in range(3)])
        d = 2 * ((w[:, None] - w[None]) ** 2).sum(-1)
        xi = 0.8 / 2 * np.exp(-d / (2.0 * np.median([d[0, 1], d[0, 2], d[1, 2]])))
        np.fill_diagonal(xi, 0)
        np.fill_diagonal(xi, 1 - xi.sum(1))
        u = xi @ w
    for k in range(3):
        np.testing.assert_allclose(row(loop, k), w[k], rtol=0, atol=1e-6)
        np.testing.assert_allclose(loop.population.tensors_of(k)["cloud|b"], u[k], rtol=0, atol=1e-6)
    ledger = loop.exchange.ledger
    assert ledger.total(round=2, direction="up", kind="adapter") == 3 * 16, "the mixture is not sent back"
    assert ledger.total(round=2, direction="down", kind="adapter") == 3 * 16


def test_fedamp_weights_are_gradient_steps_of_the_papers_function() -> None:
    """``u = w − α_K ∇ Σ_{i<j} A(‖w_i − w_j‖²)`` by autograd, up to the factor 2 of the square, which α_K takes."""
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    distances = torch.pdist(w).square()
    scale = 1.5 * float(distances.detach().quantile(0.5))
    (1 - torch.exp(-distances / scale)).sum().backward()
    assert w.grad is not None
    step = 0.9 / 3 * scale / 2
    found = message_passing((w @ w.T).detach(), 0.9, 1.5) @ w.detach()
    torch.testing.assert_close(found, w.detach() - step * w.grad)


@pytest.mark.parametrize("count", [1, 3])
def test_fedamp_of_equal_models_is_their_mean(count: int) -> None:
    matrix = message_passing(torch.ones(count, count, dtype=torch.float64), 0.6, 1.0)
    torch.testing.assert_close(matrix.sum(1), torch.ones(count, dtype=torch.float64))
    if count > 1:
        assert matrix[0, 1] == pytest.approx(0.3)
    assert message_passing(torch.eye(count).double(), 0.0, 1.0).tolist() == torch.eye(count).tolist()


def test_a_median_of_zero_leaves_others_out() -> None:
    """Six of ten pairs are at distance 0: a division by the median would not be defined."""
    gram = gram_matrix({"a": torch.tensor([[0.0], [0.0], [0.0], [0.0], [5.0]])})
    expected = torch.full((5, 5), 0.2, dtype=torch.float64).fill_diagonal_(0.4)
    expected[4], expected[:, 4] = 0.0, 0.0
    expected[4, 4] = 1.0
    torch.testing.assert_close(message_passing(gram, 0.8, 1.0), expected)
    assert squared_distances(gram)[0, 4] == 25


@pytest.mark.parametrize("beta", [1.0, 0.4])
def test_pfedme_is_the_papers_algorithm(beta: float, tmp_path: Path) -> None:
    """K = 2 with 3 to 5 steps, so that the last step of w_k may have fewer; partial cohorts; a stop in the middle."""
    settings = {"lam": 2.0, "inner_steps": 2, "outer_rate": 0.3, "beta": beta}
    how: dict[str, Any] = {"participation": {"rate": 0.6}}
    first = quadratic_loop(PFedMe(**settings), num_rounds=2, **how)
    first.run()
    rule = PFedMe(**settings)
    loop = resumed(first, tmp_path, rule=rule, executor=QuadraticExecutor(rule), num_clients=3, num_rounds=5, **how)
    loop.run()
    w, theta = np.zeros(2), np.zeros((3, 2))
    for round_index in range(5):
        clients, local = list(cohort(3, 0.6, 0, round_index)), []
        for k in clients:
            own = w.copy()
            for step in range(STEPS[k]):
                theta[k] = theta[k] - RATE * (H[k] * (theta[k] - T[k]) + 2.0 * (theta[k] - own))
                if step % 2 == 1 or step == STEPS[k] - 1:
                    own = own - 0.3 * (own - theta[k])
            local.append(own)
        w = (1 - beta) * w + beta * np.average(local, axis=0, weights=P[clients])
    np.testing.assert_allclose(rule.state_dict()["a"], w, rtol=0, atol=1e-6)
    for k in range(3):
        np.testing.assert_allclose(row(loop, k, "b"), theta[k], rtol=0, atol=1e-6)
    for direction in ("up", "down"):
        assert loop.exchange.ledger.total(round=4, direction=direction, kind="adapter") == 2 * 16, "w_k and w only"


def test_pfedme_names_missing_models(make_updates: Make) -> None:
    rule = PFedMe()
    rule.begin({"a": torch.zeros(1)})
    with pytest.raises(TrainingError, match="aggregation pfedme: clients .* returned no local model"):
        rule.aggregate(make_updates(), 0)


def two_groups(noise: float = 0.0, sizes: tuple[int, int] = (3, 3), scale: float = 1.0) -> Updates:
    """Updates in two opposite directions."""
    sign = torch.tensor([1.0] * sizes[0] + [-1.0] * sizes[1])
    generator = torch.Generator().manual_seed(1)
    start = {"a": torch.zeros(len(sign), 4)}
    end = {"a": scale * (sign[:, None] + noise * torch.randn(len(sign), 4, generator=generator))}
    ones = torch.ones(len(sign), dtype=torch.float64)
    return Updates(tuple(range(len(sign))), start, end, ones, ones)


@pytest.mark.parametrize("linkage", ["complete", "single"])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_cfl_splits_opposite_groups_whatever_their_scale(linkage: Any, scale: float) -> None:
    rule = CFL(first_round=1, linkage=linkage)
    updates = two_groups(0.1, (3, 2), scale)
    before, after = rule.aggregate(updates, 0), rule.aggregate(updates, 1)
    assert before.per_client["cluster"].tolist() == [0.0] * 5
    assert after.per_client["cluster"].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert after.metrics == {"aggregation/clusters": 2.0}
    torch.testing.assert_close(after.adapters["a"][4], updates.end["a"][3:].mean(0))
    assert rule.aggregate(updates, 2).per_client["cluster"].tolist() == [0.0, 0.0, 0.0, 1.0, 1.0], "no further"


def test_cfl_does_not_split_small_clusters_nor_clients_that_agree_or_stand_still() -> None:
    for updates in (two_groups(sizes=(1, 2)), two_groups(0.1, (4, 0)), two_groups(scale=0.0)):
        rule = CFL(first_round=0)
        assert set(rule.aggregate(updates, 5).per_client["cluster"].tolist()) == {0.0}
    rule = CFL(first_round=0, eps2=0.5, eps1=0.01)
    rule.aggregate(two_groups(0.1), 0)
    assert set(rule.aggregate(two_groups(scale=0.4), 1).per_client["cluster"].tolist()) == {0.0}, "below eps2"


def test_cfl_state_survives_a_checkpoint() -> None:
    updates = two_groups(0.1)
    first, second = CFL(first_round=0), CFL(first_round=9)
    expected = first.aggregate(updates, 0)
    second.load_state_dict(first.state_dict())
    found = second.aggregate(updates, 1)
    assert torch.equal(found.matrices["mixing"], expected.matrices["mixing"])
    assert found.per_client["cluster"].unique().numel() == 2


def test_single_linkage_finds_the_papers_optimum() -> None:
    """Of all bipartitions, the one with the lowest largest similarity between its parts."""
    vectors = torch.randn(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    similarities = unit @ unit.T

    def crossing(second: Any) -> float:
        return float(similarities[~second][:, second].max())

    every = [torch.tensor([(number >> k) & 1 == 1 for k in range(7)]) for number in range(1, 64)]
    assert crossing(bipartition(similarities, "single")) == min(crossing(second) for second in every)


def test_the_criterion_of_a_split_is_weighted() -> None:
    gram = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    assert is_divided(gram, torch.tensor([1.0, 1.0]), 0.4, 0.0)
    assert not is_divided(gram, torch.tensor([9.0, 1.0]), 0.4, 0.0), "the mean is 0.8 of the longest"
    assert not is_divided(0 * gram, torch.ones(2), 0.4, 0.0)


def test_ditto_refuses_different_shared_starts(make_updates: Make) -> None:
    updates = make_updates()
    updates.start["a"][1] += 1
    with pytest.raises(TrainingError, match="aggregation ditto needs clients that start a round with the same adapter"):
        Ditto().aggregate(updates, 0)


def loss(k: int, v: np.ndarray) -> float:
    """Of client k, with v for both parameters."""
    return float(H[k] * ((v - T[k]) ** 2).sum())


def test_ifca_trains_the_model_that_fits_best(tmp_path: Path) -> None:
    """Two models, over partial cohorts and a stop: one without clients stays, an absent client keeps what it has."""
    how: dict[str, Any] = {"participation": {"rate": 0.6}}
    settings = {"noise": 1.0, "seed": 3}
    probe = IFCA(**settings)
    probe.begin({name: torch.zeros(2) for name in "ab"} | {"b": torch.ones(2)})
    starts = [probe.state_dict()["models"][str(m)] for m in range(2)]
    assert torch.equal(starts[0]["b"], torch.ones(2))
    assert not torch.equal(starts[1]["b"], torch.ones(2))

    def given(rule: IFCA) -> IFCA:
        """All parameters are 0 in the fake loop, and noise in proportion to 0 is 0: other models are given."""
        begin = rule.begin
        rule.begin = lambda initial: (begin(initial), rule.load_state_dict(models))[0]  # type: ignore[method-assign]
        return rule

    models = {"models": {m: {n: torch.tensor(v) for n in "ab"} for m, v in (("0", [0.0, 0.0]), ("1", [-1.0, 3.0]))},
              "clusters": {}}  # fmt: skip
    first = quadratic_loop(given(IFCA()), num_rounds=2, **how)
    first.run()
    rule = given(IFCA())
    loop = resumed(first, tmp_path, rule=rule, executor=QuadraticExecutor(rule), num_clients=3, num_rounds=4, **how)
    loop.run()
    w, own, cluster = np.array([[0.0, 0.0], [-1.0, 3.0]]), np.zeros((3, 2)), {}
    for round_index in range(4):
        clients = cohort(3, 0.6, 0, round_index)
        for k in clients:
            cluster[k] = int(np.argmin([loss(k, v) for v in w]))
            own[k] = trained(w[cluster[k]], k)
        for m in range(2):
            if members := [k for k in clients if cluster[k] == m]:
                w[m] = own[members].mean(0)
                own[members] = w[m]
    assert set(cluster.values()) == {0, 1}
    for k in range(3):
        np.testing.assert_allclose(row(loop, k), own[k], rtol=0, atol=1e-6)
    for m in range(2):
        np.testing.assert_allclose(rule.state_dict()["models"][str(m)]["b"], w[m], rtol=0, atol=1e-6)
    assert loop.exchange.ledger.total(round=3, direction="down", kind="adapter") == 2 * (2 + 1) * 16


def test_ifca_takes_no_model_whose_loss_is_not_a_number() -> None:
    rule = IFCA(num_clusters=3)
    rule.begin({"a": torch.ones(2)})
    models = rule.candidates(0, [], 0)
    nan = float("nan")
    for losses, chosen in (([nan, 2.0, 1.0], 2), ([1.0, 1.0, nan], 0), ([nan, nan, nan], 0)):
        assert rule.start(0, models, torch.tensor(losses).double()) is models[chosen].tensors()


def test_fedfomo_is_the_papers_formula(tmp_path: Path) -> None:
    """One model of two others a round, the most useful so far; in NumPy, with a stop in the middle."""
    first = quadratic_loop(FedFomo(num_models=1), num_rounds=2)
    first.run()
    rule = FedFomo(num_models=1)
    loop = resumed(first, tmp_path, rule=rule, executor=QuadraticExecutor(rule), num_clients=3, num_rounds=5)
    loop.run()
    w, affinity, asked = np.zeros((3, 2)), np.zeros((3, 3)), np.zeros((3, 3))
    for round_index in range(5):
        start = w.copy()
        for k in range(3) if round_index else ():
            j = min(((k + 1) % 3, (k + 2) % 3), key=lambda j: (-affinity[k, j], asked[k, j]))
            asked[k, j] += 1
            if loss(k, w[j]) < loss(k, w[k]):
                affinity[k, j] += 1.0  # one weight, divided by itself
                start[k] = w[j]
        w = np.stack([trained(start[k], k) for k in range(3)])
    for k in range(3):
        np.testing.assert_allclose(row(loop, k), w[k], rtol=0, atol=1e-6)
    assert loop.exchange.ledger.total(round=0, direction="down", kind="adapter") == 0
    assert loop.exchange.ledger.total(round=1, direction="down", kind="adapter") == 3 * 16


def test_fedfomos_weights() -> None:
    """In NumPy; a model that is no better, equal to the own one, or of unknown loss counts nothing."""
    losses, distances = np.array([2.0, 1.0, 1.5, 3.0, 1.0, np.nan]), np.array([0.0, 2.0, 0.5, 1.0, 0.0, 1.0])
    expected = np.array([0.0, 0.5, 1.0, 0.0, 0.0, 0.0])
    found = first_order_weights(torch.tensor(losses), torch.tensor(distances))
    np.testing.assert_allclose(found, expected / expected.sum())
    own = [1.0, 0.0, 0.0]
    assert first_order_weights(torch.tensor([float("nan"), 1.0, 2.0]), torch.tensor([0.0, 1.0, 1.0])).tolist() == own
    assert first_order_weights(torch.zeros(3), torch.tensor([0.0, 1.0, 1.0])).tolist() == own


def test_fedfomo_asks_in_turn_while_nobody_is_useful() -> None:
    rule, adapters = FedFomo(num_models=2), [StoredTensors({"a": torch.tensor([float(k)])}) for k in range(5)]
    asked = []
    for round_index in range(1, 5):
        candidates = rule.candidates(3, adapters, round_index)
        assert candidates[0] is adapters[3]
        asked.append([int(c.tensors()["a"]) for c in candidates[1:]])
        start = rule.start(3, candidates, torch.tensor([0.0, 1.0, 1.0]))
        assert start["a"].item() == 3.0
    assert asked == [[4, 0], [1, 2], [4, 0], [1, 2]]
    assert rule.candidates(0, adapters[:1], 3) == (), "one client has nobody to ask"
