"""Products of factors: the same as dense matrices in NumPy, for rectangular layers and N·r above and below both sides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import orthogonal_procrustes
from torch import Tensor

from fellrec.functional.lora import (
    averaging_error,
    correction,
    factor_error,
    factored_svd,
    initial_a,
    product_norms,
    rotations,
    smaller,
    squared_norm,
    stacked,
    truncated,
)

SHAPES = [(3, 7, 5, 2), (4, 5, 9, 3), (1, 6, 6, 2)]
"""Clients, out, in, rank: N·r of 6, 12 and 2."""
every_shape = pytest.mark.parametrize("shape", SHAPES)


def problem(shape: tuple[int, int, int, int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    n, size_out, size_in, rank = shape
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, rank, size_in, generator=generator, dtype=torch.float64)
    b = torch.randn(n, size_out, rank, generator=generator, dtype=torch.float64)
    p = torch.rand(n, generator=generator, dtype=torch.float64)
    return a, b, p / p.sum()


def dense(a: Tensor, b: Tensor, p: Tensor) -> np.ndarray:
    """``Σ p_k B_k A_k``."""
    return np.einsum("n,nor,nri->oi", p, b, a)


def naive(a: Tensor, b: Tensor, p: Tensor) -> np.ndarray:
    """``B̄ Ā``."""
    return np.einsum("n,nor->or", p, b) @ np.einsum("n,nri->ri", p, a)


@every_shape
def test_products_errors_and_norms(shape: tuple[int, int, int, int]) -> None:
    a, b, p = problem(shape)
    for (left, right), expected in (
        (stacked(a, b, p), dense(a, b, p)),
        (averaging_error(a, b, p), dense(a, b, p) - naive(a, b, p)),
    ):
        np.testing.assert_allclose(left @ right, expected, atol=1e-12)
        np.testing.assert_allclose(squared_norm(left, right), np.linalg.norm(expected) ** 2, atol=1e-10)
        np.testing.assert_allclose(torch.matmul(*smaller(left, right)), expected, atol=1e-12)
        assert smaller(left, right)[0].shape[1] <= min(*shape[1:3], left.shape[1])
    np.testing.assert_allclose(product_norms(a, b), [np.linalg.norm(y @ x) for x, y in zip(a, b)], rtol=1e-10)


def test_the_relative_error_is_over_all_layers_with_their_scales() -> None:
    (a, b, p), (c, d, _) = problem((3, 7, 5, 2)), problem((3, 4, 6, 2), seed=1)
    error = np.hypot(
        2 * np.linalg.norm(dense(a, b, p) - naive(a, b, p)), np.linalg.norm(dense(c, d, p) - naive(c, d, p))
    )
    whole = np.hypot(2 * np.linalg.norm(dense(a, b, p)), np.linalg.norm(dense(c, d, p)))
    assert factor_error([(2.0, a, b), (1.0, c, d)], p) == pytest.approx(error / whole, rel=1e-10)


def test_the_relative_error_is_defined_where_products_are_zero() -> None:
    a, b, p = problem((2, 3, 3, 1))
    half = torch.full((2,), 0.5, dtype=torch.float64)
    assert factor_error([(1.0, a, torch.zeros_like(b))], p) == 0
    assert factor_error([], p) == 0
    a, b = torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[[1.0]], [[-0.5]]])
    assert factor_error([(1.0, a, b)], half) == np.inf, "1 · 1 − 2 · 0.5 is 0, and 1.5 · 0.25 is not"
    assert factor_error([(1.0, a, torch.ones_like(b))], half) == 0, "one factor is common"


@every_shape
def test_the_decomposition_is_numpys_with_fixed_signs(shape: tuple[int, int, int, int]) -> None:
    left, right = stacked(*problem(shape))
    u, s, vh = factored_svd(left, right)
    values = np.linalg.svd(left @ right, compute_uv=False)
    np.testing.assert_allclose(s, values[: len(s)], atol=1e-10)
    np.testing.assert_allclose(u * s @ vh, left @ right, atol=1e-10)
    np.testing.assert_allclose(u.T @ u, np.eye(len(s)), atol=1e-10)
    np.testing.assert_allclose(vh @ vh.T, np.eye(len(s)), atol=1e-10)
    assert (u.gather(0, u.abs().argmax(dim=0, keepdim=True)) > 0).all()
    other = factored_svd(-left, -right)
    for mine, theirs in zip((u, s, vh), other):
        np.testing.assert_allclose(mine, theirs, atol=1e-10)


@every_shape
@pytest.mark.parametrize("rank", [1, 2, 20])
def test_no_product_of_the_rank_is_nearer(shape: tuple[int, int, int, int], rank: int) -> None:
    """Eckart and Young: the distance is the root of the squared singular values that are cut off."""
    left, right = stacked(*problem(shape))
    a, b, s = truncated(left, right, rank)
    assert list(a.shape) == [rank, shape[2]]
    assert list(b.shape) == [shape[1], rank]
    distance = np.linalg.norm(left @ right - b @ a)
    assert distance == pytest.approx(float(s[rank:].square().sum().sqrt()), abs=1e-9)


@every_shape
def test_the_correction_is_the_minimum(shape: tuple[int, int, int, int]) -> None:
    """Ridge regression in NumPy: least squares with ``√λ I`` and zeros below."""
    a, b, p = problem(shape)
    strength, rank = 0.3, shape[3]
    mean_a = np.einsum("n,nri->ri", p, a)
    error = dense(a, b, p) - naive(a, b, p)
    system = np.concatenate([mean_a.T, np.sqrt(strength) * np.eye(rank)])
    expected = np.linalg.lstsq(system, np.concatenate([error.T, np.zeros((rank, shape[1]))]), rcond=None)[0].T
    np.testing.assert_allclose(correction(a, b, p, strength), expected, atol=1e-10)


def test_rotations_are_scipys_without_reflections() -> None:
    """Where SciPy's orthogonal matrix is a rotation, it is ours; where it is a reflection, ours has determinant 1."""
    generator = torch.Generator().manual_seed(0)
    clients = torch.randn(20, 3, 8, generator=generator, dtype=torch.float64)
    reference = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    found = rotations(clients @ reference.T, 1.0)
    kinds = set()
    for client, turn in zip(clients, found):
        other, _ = orthogonal_procrustes(client.T, reference.T)
        is_rotation = np.linalg.det(other) > 0
        kinds.add(bool(is_rotation))
        assert float(torch.linalg.det(turn)) == pytest.approx(1)
        if is_rotation:
            np.testing.assert_allclose(turn, other, atol=1e-10)
    assert kinds == {True, False}


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_rotations_are_orthogonal_and_softened(strength: float) -> None:
    """In the plane, the nearest orthogonal matrix to ``(1 − λ) I + λ Q`` turns by atan2(λ sin, 1 − λ + λ cos)."""
    angle = 2.0
    turn = torch.tensor([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])[None]
    (found,) = rotations(turn, strength)
    np.testing.assert_allclose(found @ found.T, np.eye(2), atol=1e-12)
    expected = np.arctan2(strength * np.sin(angle), 1 - strength + strength * np.cos(angle))
    assert float(torch.atan2(found[1, 0], found[0, 0])) == pytest.approx(expected)


def test_new_values_of_a_are_pefts_distribution() -> None:
    """Uniform within 1 / √in: the standard deviation is 1 / √(3 · in)."""
    values = initial_a((64, 400), 0, "x")
    assert float(values.abs().max()) == pytest.approx(1 / 20, rel=1e-3)
    assert float(values.std()) == pytest.approx(1 / np.sqrt(1200), rel=0.02)
    assert not torch.equal(values, initial_a((64, 400), 1, "x"))
