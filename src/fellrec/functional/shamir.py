"""Shamir's secret sharing (Shamir 1979) of secrets of 32 bytes."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence

PRIME = 2**256 + 297
"""The smallest prime above all secrets."""
SECRET_BYTES = 32
SHARE_BYTES = 33


def share(secret: bytes, holders: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Shares of a secret, any ``threshold`` of which give it back; fewer say nothing about it.

    A share is the value at ``holder + 1`` of a polynomial of degree ``threshold - 1`` with random coefficients, whose
    value at 0 is the secret, modulo `PRIME`.

    Args:
        secret: 32 bytes.
        holders: Distinct numbers from 0.
        threshold: From 1 to the number of holders.

    Returns:
        Holder → share of 33 bytes.

    Example:
        >>> shares = share(b"x" * 32, holders=[0, 3, 5], threshold=2)
        >>> recover({3: shares[3], 5: shares[5]}) == b"x" * 32
        True
    """
    assert len(secret) == SECRET_BYTES
    assert 1 <= threshold <= len(set(holders)) == len(holders)
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {holder: _value(coefficients, holder + 1).to_bytes(SHARE_BYTES, "big") for holder in holders}


def recover(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from at least ``threshold`` of its shares, by Lagrange's interpolation at 0.

    Args:
        shares: Holder → share.

    Raises:
        ValueError: If they are not those of a secret of 32 bytes, such as too few of them.
    """
    points = {holder + 1: int.from_bytes(own, "big") for holder, own in shares.items()}
    total = 0
    for x, y in points.items():
        others = [other for other in points if other != x]
        total += y * _product(others) * pow(_product(other - x for other in others), -1, PRIME)
    found = total % PRIME
    if found.bit_length() > 8 * SECRET_BYTES:
        raise ValueError("these are not enough shares of one secret")
    return found.to_bytes(SECRET_BYTES, "big")


def _value(coefficients: Sequence[int], x: int) -> int:
    total = 0
    for coefficient in reversed(coefficients):
        total = (total * x + coefficient) % PRIME
    return total


def _product(factors: Iterable[int]) -> int:
    total = 1
    for factor in factors:
        total = total * factor % PRIME
    return total
