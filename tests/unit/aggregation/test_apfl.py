"""APFL: rounds on quadratic losses and steps of AdamW, repeated in NumPy, and its limits: local training and FedAvg."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import fake_loop, resumed
from quadratic import CURVATURES, RATE, SAMPLES, STEPS, TARGETS, QuadraticExecutor
from torch import nn

from fellrec.aggregation import APFL, FedAvg, Local
from fellrec.config.compose import compose
from fellrec.errors import ConfigError
from fellrec.experiment.build import build_data, build_recommender, build_rule
from fellrec.experiment.federation import build_federation
from fellrec.federated.loop import FederatedLoop
from fellrec.federated.slot import LocalSlot, second_slot
from fellrec.federated.slot_state import SlotState
from fellrec.federated.terms import SecondModel
from fellrec.functional.participation import cohort

T, H = np.array(TARGETS), CURVATURES
P = np.array(SAMPLES) / sum(SAMPLES)


def quadratic_loop(rule: Any, **how: Any) -> FederatedLoop:
    return fake_loop(rule, QuadraticExecutor(rule), num_clients=3, **how)


def own(loop: FederatedLoop, client: int, key: str) -> np.ndarray:
    return loop.population.tensors_of(client)[key].numpy()


def served(loop: FederatedLoop, client: int) -> dict[str, torch.Tensor]:
    return dict(loop.population.score_jobs()[client].adapter.tensors())


def test_rounds_are_those_of_the_paper(tmp_path: Path) -> None:
    """SGD on both parameters, which are equal; absent clients keep v and α, and the run is stopped after two rounds.

    All three take their steps from the values before: the gradient of v is α ∇F(α v + (1 − α) w), that of α is
    ⟨v − w, ∇F(α v + (1 − α) w)⟩ over both parameters.
    """
    how: dict[str, Any] = {"participation": {"rate": 0.6}}
    first = quadratic_loop(APFL(alpha=0.4, alpha_rate=0.03), num_rounds=2, **how)
    first.run()
    rule = APFL(alpha=0.4, alpha_rate=0.03)
    loop = resumed(first, tmp_path, rule=rule, executor=QuadraticExecutor(rule), num_clients=3, num_rounds=4, **how)
    loop.run()
    shared, v, alpha = np.zeros(2), np.zeros((3, 2)), np.full(3, 0.4)
    for round_index in range(4):
        clients = list(cohort(3, 0.6, 0, round_index))
        ends = []
        for k in clients:
            w = shared.copy()
            for _ in range(STEPS[k]):
                gradient = H[k] * (alpha[k] * v[k] + (1 - alpha[k]) * w - T[k])
                v_next, w_next = v[k] - RATE * alpha[k] * gradient, w - RATE * H[k] * (w - T[k])
                alpha[k] = np.clip(alpha[k] - 0.03 * 2 * (v[k] - w) @ gradient, 0, 1)
                v[k], w = v_next, w_next
            ends.append(w)
        shared = np.average(ends, axis=0, weights=P[clients])
    assert len({float(a) for a in alpha}) == 3, "every client has another α"
    for k in range(3):
        np.testing.assert_allclose(loop.population.bank.row(k)["a"], shared, rtol=0, atol=1e-6)
        np.testing.assert_allclose(own(loop, k, "second|b"), v[k], rtol=0, atol=1e-6)
        np.testing.assert_allclose(own(loop, k, "alpha|a"), alpha[k], rtol=0, atol=1e-6)
        np.testing.assert_allclose(served(loop, k)["a"], alpha[k] * v[k] + (1 - alpha[k]) * shared, rtol=0, atol=1e-6)
    assert loop.exchange.ledger.total(round=0, direction="up", kind="adapter") == 2 * 16, "v and α are not sent"


def test_alpha_stays_between_0_and_1() -> None:
    for start, bound in ((0.9, 1.0), (0.1, 0.0)):
        loop = quadratic_loop(APFL(alpha=start, alpha_rate=100.0), num_rounds=3)
        loop.run()
        assert bound in {float(own(loop, k, "alpha|a")) for k in range(3)}


def adamw(theta: Any, state: list[Any], gradient: Any, rate: float) -> Any:
    """One step of AdamW with decay 0.01."""
    state[0] += 1
    state[1] = 0.9 * state[1] + 0.1 * gradient
    state[2] = 0.999 * state[2] + 0.001 * gradient**2
    m, u = state[1] / (1 - 0.9 ** state[0]), state[2] / (1 - 0.999 ** state[0])
    return theta * (1 - rate * 0.01) - rate * m / (np.sqrt(u) + 1e-8)


def opened(begin: SlotState, model: SecondModel) -> LocalSlot:
    def build(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(parameters.values()), weight_decay=0.01)

    parameters = {name: nn.Parameter(value.clone()) for name, value in begin.adapter.items()}
    second = second_slot(model, begin, parameters, build, nullcontext)
    return LocalSlot(parameters, begin, build(parameters), [], second)


def steps_of(slot: LocalSlot, num_steps: int) -> None:
    """The loss is ``Σ (x − 1)²``; the gradients are halved after the terms have seen them."""
    assert slot.second is not None
    for _ in range(num_steps):
        with slot.second.at_point():
            (slot.second.parameters["a"] - 1).square().sum().backward()
            assert set(slot.second.norms()) == {"a"}
            slot.second.step(0.5, 0.05)
        (slot.parameters["a"] - 1).square().sum().backward()
        slot.step(0.5, 0.05)


def test_steps_of_adamw_and_a_stop_between_them() -> None:
    """V has its own moments; α sees the gradient before clipping; five steps are two and three, bit for bit."""
    w, v, alpha = np.array([0.3, -2.0]), np.array([0.5, 3.0]), 0.6
    start = SlotState({"a": torch.tensor(w).float()}, tensors={"second|a": torch.tensor(v).float()})
    model = APFL(alpha=alpha, alpha_rate=0.02).second_model
    assert model is not None
    slot = opened(start, model)
    steps_of(slot, 5)
    whole = slot.state()
    of_w, of_v = [0, 0.0, 0.0], [0, 0.0, 0.0]
    for _ in range(5):
        gradient = 2 * (alpha * v + (1 - alpha) * w - 1)
        alpha_next = alpha - 0.02 * (v - w) @ gradient
        v, w = adamw(v, of_v, 0.5 * alpha * gradient, 0.05), adamw(w, of_w, (w - 1), 0.05)
        alpha = alpha_next
    np.testing.assert_allclose(whole.adapter["a"], w, rtol=0, atol=1e-6)
    np.testing.assert_allclose(whole.tensors["second|a"], v, rtol=0, atol=1e-6)
    np.testing.assert_allclose(whole.tensors["alpha|a"], alpha, rtol=0, atol=1e-6)
    np.testing.assert_allclose(whole.optimizer["a|second.exp_avg"], of_v[1], rtol=0, atol=1e-6)
    np.testing.assert_allclose(whole.optimizer["a|exp_avg_sq"], of_w[2], rtol=0, atol=1e-6)

    slot = opened(start, model)
    steps_of(slot, 2)
    slot = opened(slot.state(), model)
    steps_of(slot, 3)
    again = slot.state()
    assert again.tensors.keys() == whole.tensors.keys() == {"second|a", "alpha|a"}
    for part in ("adapter", "optimizer", "tensors"):
        assert all(torch.equal(tensor, getattr(again, part)[key]) for key, tensor in getattr(whole, part).items())


def test_a_step_whose_gradients_are_not_finite_leaves_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a scaled loss such a step is left out."""
    model = APFL(alpha=0.3, alpha_rate=1.0).second_model
    assert model is not None
    slot = opened(SlotState({"a": torch.ones(2)}, tensors={"second|a": torch.zeros(2)}), model)
    assert slot.second is not None
    with slot.second.at_point():
        slot.second.parameters["a"].grad = torch.tensor([torch.inf, 1.0])
        slot.second.norms()
    assert float(slot.state().tensors["alpha|a"]) == 0.3
    assert torch.equal(slot.second.parameters["a"], torch.zeros(2)), "it has its own values again"


def test_alpha_1_is_local_training_and_alpha_0_is_fedavg() -> None:
    """Bit for bit, with absent clients; the shared model is FedAvg's in both."""
    how: dict[str, Any] = {"participation": {"rate": 0.6}, "num_rounds": 4}
    local, fedavg = quadratic_loop(Local(), **how), quadratic_loop(FedAvg(), **how)
    local.run(), fedavg.run()
    for alpha, other in ((1.0, local), (0.0, fedavg)):
        loop = quadratic_loop(APFL(alpha=alpha, alpha_rate=0.0), **how)
        loop.run()
        for k in range(3):
            assert torch.equal(served(loop, k)["a"], other.population.bank.row(k)["a"])
            assert torch.equal(loop.population.bank.row(k)["a"], fedavg.population.bank.row(k)["a"])


def test_a_real_run_is_local_training_and_fedavg_at_its_limits(tiny_overrides: list[str]) -> None:
    """With dropout, clipping, warm-up and a table of item vectors, of which each of the two models has its own."""
    how = ["adapter=lora", "adapter.dropout=0.2", "trainer.max_local_steps=4", "trainer.warmup_steps=3",
           "trainer.accumulate_grad_batches=2", "objective.item_encoder=encoded", "objective.refresh_items=2"]  # fmt: skip
    config = compose([*tiny_overrides, *how])
    recommender, found = build_recommender(config, build_data(config)), {}
    for name, given in (("Local", {}), ("FedAvg", {}), ("APFL", {"alpha": 1.0, "alpha_rate": 0.0})):
        config.aggregation = {"_target_": f"fellrec.aggregation.{name}", **given}
        loop = build_federation(config, recommender).loop()
        for round_index in range(2):
            loop.run_round(round_index)
        found[name.lower()] = loop.population
    mixed = found["apfl"].score_jobs()
    for k in range(found["local"].num_clients):
        for key, expected in found["local"].bank.row(k).items():
            assert torch.equal(mixed[k].adapter.tensors()[key], expected)
        for key, expected in found["fedavg"].bank.row(k).items():
            assert torch.equal(found["apfl"].bank.row(k)[key], expected)
        moments = found["local"].optimizer_of(k)
        assert all(
            torch.equal(found["apfl"].optimizer_of(k)[x.replace("|", "|second.")], t) for x, t in moments.items()
        )


class Beside(FedAvg):
    """A rule of one's own that declares nothing."""

    second_model = SecondModel()


def test_a_second_model_is_refused_with_an_executed_cut(tiny_overrides: list[str], monkeypatch: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    config = compose([*tiny_overrides, "split.transport=inprocess"])
    for target, name in (("fellrec.aggregation.APFL", "apfl"), (f"{__name__}.Beside", "beside")):
        config.aggregation = {"_target_": target}
        with pytest.raises(ConfigError, match=f"aggregation {name} needs the whole model in one process: split"):
            build_rule(config)


@pytest.mark.parametrize("given", [{"alpha": 1.5}, {"alpha": -0.1}, {"alpha_rate": -1.0}])
def test_settings_out_of_range_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"aggregation\.alpha.* is not allowed"):
        APFL(**given)
