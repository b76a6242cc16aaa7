"""Persistence-weighted mixing against its equations, written out in NumPy on the adapters themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fellrec.aggregation import FedAvg, FELLRec, Persistence, Uniform
from fellrec.aggregation.base import AggregationCallback
from fellrec.errors import ConfigError
from fellrec.federated.checkpoint import CheckpointFolder
from fellrec.federated.records import Updates
from fellrec.functional.sketch import sketch_updates

SAMPLES = torch.tensor([3.0, 1.0, 2.0]).double()


def updates(deltas: torch.Tensor, clients: tuple[int, ...] = (0, 1, 2)) -> Updates:
    """Clients that start at 1 everywhere and move by ``deltas``, a row each."""
    start = {"a": torch.ones(len(deltas), 2, 10), "b": torch.ones(len(deltas), 5)}
    end = {"a": start["a"] + deltas[:, :20].reshape(-1, 2, 10), "b": start["b"] + deltas[:, 20:]}
    return Updates(clients, start, end, torch.ones(len(deltas)).double(), SAMPLES[list(clients)])


@pytest.fixture
def two_rounds() -> tuple[torch.Tensor, torch.Tensor]:
    """Client 0 goes on as before, client 1 turns round, client 2 does something else."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(3, 25, generator=generator)
    second = torch.stack([first[0], -first[1], torch.randn(25, generator=generator)])
    return first, second


def average_of(others: str, moves: torch.Tensor) -> np.ndarray:
    """q, row by row."""
    samples, values = SAMPLES.numpy(), moves.double().numpy()
    if others == "similar":
        lengths = np.linalg.norm(values, axis=1)
        similarity = (1 + values @ values.T / np.outer(lengths, lengths)) / 2
        return similarity / similarity.sum(axis=1, keepdims=True)
    return np.tile(samples / samples.sum() if others == "samples" else np.full(3, 1 / 3), (3, 1))


def expected_weights(first: torch.Tensor, second: torch.Tensor, others: str, exponent: float) -> list[float]:
    weights = []
    for c in range(3):
        now, before = (x.double().numpy()[c] - average_of(others, x)[c] @ x.double().numpy() for x in (second, first))
        cosine = float(now @ before / np.linalg.norm(now) / np.linalg.norm(before))
        weights.append(max(0.0, cosine) ** exponent)
    return weights


@pytest.mark.parametrize(
    ("others", "rule"),
    [("samples", FedAvg()), ("equal", Uniform()), ("similar", FELLRec(attention=True, heating=False))],
)
def test_the_first_round_is_the_average(
    others: str, rule: AggregationCallback, two_rounds: tuple[torch.Tensor, torch.Tensor]
) -> None:
    given = updates(two_rounds[0])
    matrix = Persistence(others=others).mixing_matrix(given, 0)
    torch.testing.assert_close(matrix, rule.mixing_matrix(given, 0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("others", "exponent"), [("samples", 0.5), ("equal", 1.0), ("similar", 1.0), ("similar", 3.0)])
def test_later_rounds_follow_the_equations(
    others: str, exponent: float, two_rounds: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """25 entries fall into 4,096 buckets, so the sketch is all but exact here: the numbers are those without it."""
    first, second = two_rounds
    rule = Persistence(exponent, others)
    rule.aggregate(updates(first), 0)
    result = rule.aggregate(updates(second), 1)
    weights = expected_weights(first, second, others, exponent)
    assert weights[0] > 0.03
    assert weights[1] == 0
    np.testing.assert_allclose(result.per_client["self_weight"], weights, atol=1e-6)
    q = average_of(others, second)
    mixing = [[(1 - w) * q[c, n] + w * (c == n) for n in range(3)] for c, w in enumerate(weights)]
    np.testing.assert_allclose(result.matrices["mixing"], mixing, atol=1e-6)
    end = updates(second).end["b"].double().numpy()
    np.testing.assert_allclose(result.adapters["b"], np.array(mixing) @ end, atol=1e-5)


def test_a_resumed_rule_gives_the_same_bits(two_rounds: tuple[torch.Tensor, torch.Tensor], tmp_path: Path) -> None:
    first, second = two_rounds
    whole, stopped, resumed = Persistence(), Persistence(), Persistence()
    whole.aggregate(updates(first), 0)
    stopped.aggregate(updates(first), 0)
    checkpoints = CheckpointFolder(tmp_path)
    checkpoints.save({"rule": stopped}, 1)
    assert checkpoints.load({"rule": resumed}) == 1
    expected, found = whole.aggregate(updates(second), 1), resumed.aggregate(updates(second), 1)
    for name, parameter in expected.adapters.items():
        assert torch.equal(found.adapters[name], parameter)


def test_a_client_that_was_absent_is_compared_with_its_own_last_round(
    two_rounds: tuple[torch.Tensor, torch.Tensor],
) -> None:
    first, second = two_rounds
    rule = Persistence(others="samples")
    rule.aggregate(updates(first), 0)
    rule.aggregate(updates(second[1:], (1, 2)), 1)
    weights = rule.aggregate(updates(second), 2).per_client["self_weight"]
    assert weights[0].item() == pytest.approx(expected_weights(first, second, "samples", 1.0)[0], abs=1e-6)
    newcomer = Persistence()
    newcomer.aggregate(updates(first[1:], (1, 2)), 0)
    assert newcomer.aggregate(updates(second), 1).per_client["self_weight"][0] == 0


def test_noise_is_averaged_and_what_lasts_is_kept() -> None:
    """A lasting direction as long as the noise: cos(d, d') is 1/2 on average; without it, 0."""
    generator = torch.Generator().manual_seed(0)
    own = torch.nn.functional.normalize(torch.randn(3, 25, generator=generator), dim=1)
    lasting, noise = Persistence(exponent=1), Persistence(exponent=1)
    found: dict[str, list[torch.Tensor]] = {"lasting": [], "noise": []}
    for round_index in range(60):
        random = torch.randn(3, 25, generator=generator) / 5
        found["lasting"].append(lasting.aggregate(updates(own + random), round_index).per_client["self_weight"])
        found["noise"].append(noise.aggregate(updates(random), round_index).per_client["self_weight"])
    assert torch.stack(found["lasting"][1:]).mean() == pytest.approx(0.5, abs=0.1)
    assert torch.stack(found["noise"][1:]).mean() < 0.15


@pytest.mark.parametrize("exponent", [0, -1, float("nan"), "half"])
def test_impossible_exponents_are_refused(exponent: object) -> None:
    with pytest.raises(ConfigError, match="aggregation.exponent=.* is not allowed: a number above 0"):
        Persistence(exponent)  # type: ignore[arg-type]


def test_an_unknown_average_is_refused() -> None:
    with pytest.raises(ConfigError, match="aggregation.others=all is not allowed: similar, equal or samples"):
        Persistence(others="all")


def test_sketches_keep_inner_products() -> None:
    """Mean zero and standard deviation at most sqrt(2 / m) of the error, over 100 pairs of 5,000 entries."""
    generator = torch.Generator().manual_seed(3)
    end = torch.nn.functional.normalize(torch.randn(15, 5000, generator=generator), dim=1)
    stack = {"a": end[:, :3000].reshape(15, 30, 100), "b": end[:, 3000:]}
    sketch = sketch_updates(stack, {name: torch.zeros_like(part) for name, part in stack.items()}, 256)
    errors = (sketch @ sketch.T - end.double() @ end.double().T)[~torch.eye(15, dtype=torch.bool)]
    assert abs(errors.mean()) < 3 * (2 / 256) ** 0.5 / 105**0.5
    assert 0.3 * (2 / 256) ** 0.5 < errors.std() < (2 / 256) ** 0.5
