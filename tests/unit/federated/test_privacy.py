"""Differential privacy of updates: clipping, noise, what a client can change, what rules get, ε of what was done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes import FakeExecutor, adapters, fake_loop, resumed
from torch import Tensor

from fellrec.aggregation import (
    APFL,
    Ditto,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    Uniform,
)
from fellrec.errors import CheckpointError, ConfigError, TrainingError
from fellrec.federated.accountant import Sampling
from fellrec.federated.privacy import PrivateMean
from fellrec.federated.privacy_settings import PrivacySettings
from fellrec.federated.records import Updates
from fellrec.functional.privacy import norm_of

DELTA = 1e-5
FOUR = Sampling("all", 4, 4)


def private(sampling: Sampling = FOUR, num_rounds: int = 3, seed: int = 0, **settings: Any) -> PrivateMean:
    given: dict[str, Any] = {"unit": "client", "epsilon": 8.0, "delta": DELTA, **settings}
    return PrivateMean(PrivacySettings(**given), sampling, num_rounds, seed)


def update(scale: float, seed: int = 0, size: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a": scale * torch.randn(size, size, generator=generator), "b": scale * torch.randn(5, generator=generator)}


def difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: left[name] - right[name] for name in left}


def test_the_noise_has_the_standard_deviation_of_its_law() -> None:
    """Multiplier · clip_norm / cohort; the relative error of a standard deviation from n numbers is about 1 / √(2n)."""
    mean = private(clip_norm=0.5)
    found = mean.mean([update(0.0, size=400)], [0], 0)["a"]
    assert mean.costs()["privacy/noise_std"] == pytest.approx(mean.multiplier * 0.5 / 4)
    assert float(found.std()) == pytest.approx(mean.multiplier * 0.5 / 4, rel=4 / math.sqrt(2 * found.numel()))
    assert abs(float(found.mean())) < 4 * float(found.std()) / math.sqrt(found.numel())


def test_noise_is_a_function_of_seed_round_and_parameter() -> None:
    first = private().mean([update(0.0)], [0], 0)
    assert torch.equal(private().mean([update(0.0)], [0], 0)["a"], first["a"])
    for other in (private().mean([update(0.0)], [0], 1), private(seed=1).mean([update(0.0)], [0], 0)):
        assert not torch.equal(other["a"], first["a"])


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_mean_is_that_of_clipped_updates_and_one_client_moves_it_by_at_most_its_norm(scale: float) -> None:
    """The noise does not depend on the updates, so it cancels in the difference of two means."""
    others = [update(1.0, seed) for seed in (1, 2)]
    without = private(clip_norm=0.5).mean([*others, update(0.0)], range(3), 0)
    moved = difference(private(clip_norm=0.5).mean([*others, update(scale, 3)], range(3), 0), without)
    given = update(scale, 3)
    assert norm_of(moved) == pytest.approx(min(0.5, norm_of(given)) / 4, rel=1e-6)
    torch.testing.assert_close(
        moved["a"] / norm_of(moved), (given["a"] / norm_of(given)).double(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_update_that_is_not_finite_counts_as_zero(bad: float) -> None:
    zero, broken = update(0.0), {**update(1.0), "b": torch.full((5,), bad)}
    found = private().mean([update(1.0), broken], [0, 1], 0)
    expected = private().mean([update(1.0), zero], [0, 1], 0)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_norm_follows_a_noised_count_and_the_updates_get_more_noise_for_it() -> None:
    """With (z⁻² - (2σ)⁻²)^(-1/2), Andrew et al.'s theorem 1; of norms 1, 2, …, 200 the median is about 100."""
    sampling = Sampling("all", 200, 200)
    mean = private(sampling, num_rounds=200, epsilon=50.0, clip_quantile=0.5, clip_norm=3.0)
    assert mean.count_std == max(10.0, mean.multiplier)
    z = (mean.multiplier**-2 - (2 * mean.count_std) ** -2) ** -0.5
    assert mean.std == pytest.approx(z * 3.0 / 200)
    updates = [{"a": torch.tensor([float(norm)])} for norm in range(1, 201)]
    for round_index in range(120):
        mean.mean(updates, range(200), round_index)
    assert 80 < mean.bound < 120
    with pytest.raises(ConfigError, match=r"privacy\.count_std=0\.1 is not allowed: more than half"):
        private(clip_quantile=0.5, count_std=0.1)


RULES = [FedAvg, Uniform, FedProx, FedAvgM, FedAdam, FedYogi, FedAdagrad, Ditto, APFL]


class Uneven(FakeExecutor):
    """Clients with other losses, numbers of samples and of steps, and the same updates."""

    def train(self, jobs: Any, events: Any) -> Any:
        from dataclasses import replace

        for found in super().train(jobs, events):
            yield replace(found, loss=found.loss + 7, num_samples=1 + 5 * found.num_samples, num_steps=3)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_what_a_rule_makes_of_the_updates_depends_on_their_noised_mean_only(rule: Any) -> None:
    loops = [fake_loop(rule(), executor, privacy=private()) for executor in (FakeExecutor(), Uneven())]
    for loop in loops:
        loop.run()
    served = [[loop.population.served_by(client) for client in range(4)] for loop in loops]
    shared = [adapters(loop)[:1] for loop in loops]
    assert served[0] == served[1]
    assert shared[0] == shared[1]
    assert torch.tensor(list(shared[0][0].values())).isfinite().all()


def test_fedavg_moves_by_the_noised_mean() -> None:
    """Clients add 1, 2, 3, 4 to four numbers: the norms are 2, 4, 6, 8, and clipped to 2 each adds 1."""
    loop, expected = fake_loop(FedAvg(), privacy=private(clip_norm=2.0)), private(clip_norm=2.0)
    loop.run_round(0)
    noise = expected.mean([{name: torch.zeros(2) for name in ("a", "b")}], [0], 0)
    for name, values in adapters(loop)[0].items():
        assert values == pytest.approx((1 + noise[name]).tolist(), rel=1e-6)


def test_a_rule_that_reads_losses_fails_instead_of_getting_them() -> None:
    class ByLoss(FedAvg):
        sees = "sums"

        def mixing_matrix(self, updates: Updates, round_index: int) -> Tensor:
            weights = updates.losses / updates.losses.sum()
            return weights.expand(len(weights), -1)

    with pytest.raises(TrainingError, match="not finite"):
        fake_loop(ByLoss(), privacy=private()).run_round(0)


def test_epsilon_is_that_of_the_client_that_took_part_most_often_without_those_that_dropped_out() -> None:
    mean = private(num_rounds=12)
    loop = fake_loop(FedAvg(), participation={"dropout": 0.4, "quorum": 0.1}, num_rounds=12, privacy=mean)
    counts = dict.fromkeys(range(4), 0)
    for round_index in range(12):
        record = loop.run_round(round_index)
        assert record.cohort is not None
        for row in record.cohort.rows:
            counts[row] += 1
        assert record.costs["privacy/epsilon"] == FOUR.epsilon(mean.multiplier, max(counts.values()), DELTA)
    assert 0 < max(counts.values()) < 12  # the seed lets every client drop out at least once
    assert mean.epsilon < 8.0


def test_a_client_that_failed_is_paid_for_as_its_failure_may_depend_on_its_data() -> None:
    mean = private()
    fails = FakeExecutor(fails=lambda job: job.row != 0)
    loop = fake_loop(FedAvg(), fails, participation={"on_failure": "skip", "quorum": 0.1}, privacy=mean)
    loop.run()
    assert mean.epsilon == pytest.approx(8.0, rel=1e-6)
    assert mean.report()["num_rounds"] == 3


@pytest.mark.parametrize("quantile", [None, 0.5])
def test_a_resumed_run_has_the_noise_the_norm_and_the_cost_of_one_that_was_not_stopped(
    tmp_path: Path, quantile: float | None
) -> None:
    def how() -> dict[str, Any]:
        return {"rule": FedAdam(), "privacy": private(clip_quantile=quantile)}

    whole = fake_loop(**how())
    whole.run()
    stopped = fake_loop(**how())
    stopped.run_round(0)
    again = resumed(stopped, tmp_path, **how())
    again.run()
    assert adapters(again) == adapters(whole)
    assert again.exchange.privacy is not None
    assert whole.exchange.privacy is not None
    assert again.exchange.privacy.report() == whole.exchange.privacy.report()
    with pytest.raises(CheckpointError, match="noise multiplier"):
        private(epsilon=4.0).load_state_dict(whole.exchange.privacy.state_dict())


def test_a_delta_that_allows_publishing_a_client_is_named(caplog: pytest.LogCaptureFixture) -> None:
    private(delta=0.5)
    assert "less than 1 / number of clients" in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epsilon": 0.0}, "privacy.epsilon=0.0 is not allowed: a number above 0, or null"),
        ({"delta": 1.0}, r"privacy.delta=1.0 is not allowed: a number in \(0, 1\), or null"),
        ({"delta": None}, "privacy.delta=null is not allowed with privacy.unit=client"),
        ({"epsilon": 501.0}, "at most 500"),
        ({"unit": "none"}, "privacy.epsilon=8.0 and privacy.delta=1e-05 has no effect with privacy=none"),
    ],
)
def test_settings_that_protect_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrivacySettings(**{"unit": "client", "epsilon": 8.0, "delta": DELTA, **given})
