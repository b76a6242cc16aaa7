import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fellrec.functional import mixing, stacks


def random_stack(num_clients: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(num_clients, 3, 4, generator=generator),
        "b": torch.randn(num_clients, 5, generator=generator),
    }


def concatenated(stack: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([p.numpy().astype(np.float64).reshape(len(p), -1) for p in stack.values()], axis=1)


def test_gram_equals_that_of_the_concatenation(monkeypatch):
    monkeypatch.setattr(stacks, "BLOCK_BYTES", 5 * 4 * 8)  # several blocks, the last one shorter
    end, start = random_stack(4), random_stack(4, seed=1)
    vectors = concatenated(end)
    np.testing.assert_allclose(mixing.gram_matrix(end), vectors @ vectors.T, rtol=1e-12)
    updates = vectors - concatenated(start)
    expected = updates @ updates.T  # in float32: at most one rounding, of 2^-24, for each entry
    bound = vectors.shape[1] * 2**-24 * expected.max()
    np.testing.assert_allclose(mixing.gram_matrix(end, start), expected, rtol=0, atol=bound)
    wide = [{name: tensor.double() for name, tensor in stack.items()} for stack in (end, start)]
    np.testing.assert_allclose(mixing.gram_matrix(*wide), expected, rtol=1e-12)


@pytest.mark.parametrize("num_clients", [1, 3, 4, 7])
def test_gram_of_more_clients_than_are_multiplied_at_once(monkeypatch, num_clients):
    """Only half of the products are computed; the other half is the same by symmetry."""
    end, start = random_stack(num_clients), random_stack(num_clients, seed=1)
    whole = mixing.gram_matrix(end, start)
    monkeypatch.setattr(mixing, "_ROWS", 3)
    gram = mixing.gram_matrix(end, start)
    torch.testing.assert_close(gram, whole, rtol=0, atol=whole.max().item() * 2**-20)
    updates = concatenated(end) - concatenated(start)
    np.testing.assert_allclose(gram, updates @ updates.T, rtol=0, atol=whole.max().item() * 2**-20)
    for first in range(0, num_clients, 3):
        assert torch.equal(gram[first + 3 :, first : first + 3], gram[first : first + 3, first + 3 :].T)


def test_small_updates_of_large_adapters_keep_their_direction():
    # Differences are computed before the products, so they are not lost to rounding.
    start = {"a": torch.full((2, 2), 1000.0)}
    end = {"a": start["a"] + torch.tensor([[0.25, 0.0], [0.0, 0.25]])}
    np.testing.assert_allclose(mixing.similarity(mixing.gram_matrix(end, start)), [[1, 0.5], [0.5, 1]], atol=1e-12)


@pytest.mark.parametrize(
    ("other", "expected"), [([1.0, 0.0], 1.0), ([-3.0, 0.0], 0.0), ([0.0, 2.0], 0.5), ([0.0, 0.0], 0.5)]
)
def test_similarity_of_alike_opposed_orthogonal_and_zero_vectors(other, expected):
    gram = mixing.gram_matrix({"a": torch.tensor([[2.0, 0.0], other])})
    np.testing.assert_allclose(mixing.similarity(gram), [[1, expected], [expected, 1]], atol=1e-15)


def test_similarity_of_tiny_vectors_does_not_underflow():
    gram = mixing.gram_matrix({"a": torch.tensor([[1e-30, 0.0], [1e-30, 0.0]])})
    np.testing.assert_allclose(mixing.similarity(gram), np.ones((2, 2)))


@pytest.mark.parametrize(
    ("p", "rounds", "expected"),
    [
        (0.2, range(5), [0.747, 0.870, 0.951, 0.988, 0.998]),
        (0.6, [0, 1, 2, 9], [0.650, 0.696, 0.740, 0.960]),
    ],
)
def test_learning_speed_has_the_values_of_method(p, rounds, expected):
    speeds = [
        mixing.learning_speed(torch.tensor([p], dtype=torch.float64), 0.7, mixing.heating_exponent(t, 5.0)).item()
        for t in rounds
    ]
    assert speeds == pytest.approx(expected, abs=6e-4)


def test_released_exponent_has_the_values_of_method():
    p = torch.tensor([0.2], dtype=torch.float64)
    speeds = [mixing.learning_speed(p, 0.7, mixing.released_exponent(t, 5.0)).item() for t in range(5)]
    assert speeds == pytest.approx([0.747, 0.9999, 1, 1, 1], abs=6e-4)


def test_difficulty_and_speed_have_the_values_of_method():
    p = mixing.difficulty(torch.tensor([2.091, 2.080, 2.211, 2.152, 2.089], dtype=torch.float64), 0.05)
    # METHOD's losses are rounded to 0.001, which moves p by up to 0.001 / 0.05 = 2 %.
    assert p.tolist() == pytest.approx([0.058, 0.046, 0.642, 0.198, 0.056], rel=0.02)
    speed = mixing.learning_speed(p, 0.7, mixing.heating_exponent(0, 5.0))
    assert speed.tolist() == pytest.approx([0.845, 0.860, 0.644, 0.748, 0.847], abs=1.5e-3)


def test_speed_is_one_where_the_power_underflows():
    p = mixing.difficulty(torch.tensor([0.0, 1000.0], dtype=torch.float64), 0.05)
    assert p.tolist() == [0.0, 1.0]
    assert mixing.learning_speed(p, 0.7, 1.0).tolist() == [1.0, pytest.approx(np.tanh(0.7))]
    assert mixing.learning_speed(torch.tensor([1e-300], dtype=torch.float64), 0.7, 5.0).tolist() == [1.0]
    assert mixing.learning_speed(p, 0.0, 1.0).tolist() == [0.0, 0.0]


@given(st.integers(1, 7), st.integers(0, 1000))
def test_sequential_matrix_equals_in_place_mixing(num_clients, seed):
    rng = np.random.default_rng(seed)
    weights = rng.random((num_clients, num_clients)) + 0.01
    weights /= weights.sum(1, keepdims=True)
    adapters = rng.normal(size=(num_clients, 6))
    in_place = adapters.copy()
    for client in range(num_clients):
        in_place[client] = weights[client] @ in_place
    matrix = mixing.sequential_matrix(torch.from_numpy(weights)).numpy()
    np.testing.assert_allclose(matrix @ adapters, in_place, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_mixture_is_a_matrix_product_per_parameter(dtype, monkeypatch):
    monkeypatch.setattr(stacks, "BLOCK_BYTES", 5 * 3 * 8)
    matrix = torch.softmax(torch.randn(3, 3, generator=torch.Generator().manual_seed(2)), dim=1)
    stack = {name: p.to(dtype) for name, p in random_stack(3).items()}
    mixed = mixing.Mixture(matrix, stack)
    for name, parameter in stack.items():
        expected = np.einsum("rs,s...->r...", matrix.double().numpy(), parameter.double().numpy())
        assert mixed[name].dtype == dtype
        assert mixed[name].shape == parameter.shape
        torch.testing.assert_close(mixed[name], torch.from_numpy(expected).to(dtype), rtol=0, atol=0)


def test_a_mixture_accepts_transposed_parameters():
    parameter = torch.arange(6.0).reshape(3, 2).T  # [2 clients, 3], not contiguous
    mixed = mixing.Mixture(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), {"a": parameter})["a"]
    torch.testing.assert_close(mixed, parameter.flip(0), rtol=0, atol=0)
