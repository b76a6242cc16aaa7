"""Fixed point sums are exact and within the rounding bound; Shamir's shares against sympy and by their law."""

from __future__ import annotations

import itertools
import secrets

import numpy as np
import pytest
import torch
from sympy import isprime
from sympy.polys.domains import GF
from sympy.polys.polyfuncs import interpolate

from fellrec.functional.fixed_point import decode, encode, largest, rounding_bound
from fellrec.functional.shamir import PRIME, recover, share


@pytest.mark.parametrize(("bits", "word"), [(24, 32), (4, 32), (40, 64)])
def test_sums_are_exact_and_near_the_real_ones(bits: int, word: int) -> None:
    """Python's integers give the same sum; against the real sum the error is at most n 2^-(bits + 1)."""
    most = largest(6, bits, word)
    values = (
        (torch.rand(6, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(bits)) * 2 - 1) * most * 0.999
    )
    values = values.clamp(-1e3, 1e3)
    words = [encode(row, bits, word) for row in values]
    total = np.sum(words, axis=0, dtype=words[0].dtype)
    exact = [sum(round(x * 2**bits) for x in column) for column in values.T.tolist()]
    assert (decode(total, bits) * 2**bits).tolist() == exact
    assert float((decode(total, bits) - values.sum(dim=0)).abs().max()) <= rounding_bound(6, bits) * (1 + 1e-9)


def test_a_value_that_is_too_large_would_wrap_around() -> None:
    assert decode(encode(torch.tensor([128.0]), 24), 24).tolist() == [-128.0], "why clients check their range"
    assert largest(1, 24) == 128


def test_every_set_of_enough_shares_gives_the_secret_and_a_smaller_one_fits_any_secret() -> None:
    """Two shares of three and any other secret lie on one polynomial of degree 2: they exclude no secret."""
    assert isprime(PRIME)
    secret = secrets.token_bytes(32)
    shares = share(secret, holders=range(5), threshold=3)
    for some in itertools.combinations(range(5), 3):
        assert recover({holder: shares[holder] for holder in some}) == secret
    other = int.from_bytes(b"another secret of thirty-two byt", "big")
    (x1, y1), (x2, y2) = ((holder + 1, int.from_bytes(shares[holder], "big")) for holder in (1, 4))
    field = GF(PRIME)
    # The quadratic c + a x + b x² through both: two linear equations for a and b.
    determinant = field(x1) * field(x2) ** 2 - field(x2) * field(x1) ** 2
    a = ((field(y1) - field(other)) * field(x2) ** 2 - (field(y2) - field(other)) * field(x1) ** 2) / determinant
    b = (field(x1) * (field(y2) - field(other)) - field(x2) * (field(y1) - field(other))) / determinant
    assert all(field(other) + a * field(x) + b * field(x) ** 2 == field(y) for x, y in ((x1, y1), (x2, y2)))


def test_too_few_shares_are_not_taken_for_a_secret_often() -> None:
    """Interpolating two of three shares gives a random element: a secret of 32 bytes nearly always, but another one."""
    secret = bytes(32)
    shares = share(secret, holders=[0, 1, 2], threshold=3)
    assert recover({0: shares[0], 1: shares[1]}) != secret


def test_small_numbers_as_by_sympy() -> None:
    """Shares of a polynomial with integer coefficients, interpolated by sympy over the rationals."""
    polynomial = {1: 5 + 3 + 2, 2: 5 + 6 + 8, 3: 5 + 9 + 18}
    assert interpolate(list(polynomial.items()), 0) == 5
    shares = {x - 1: y.to_bytes(33, "big") for x, y in polynomial.items()}
    assert int.from_bytes(recover(shares), "big") == 5
