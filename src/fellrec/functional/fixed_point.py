"""Fixed point numbers as integers modulo 2^k, whose sums are exact in any order."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Words = NDArray[Any]
"""Unsigned integers of 32 or 64 bits, added modulo 2^32 or 2^64."""


def encode(values: Tensor, bits: int, word: int = 32) -> Words:
    """The nearest multiples of ``2^-bits``, as two's complement integers modulo ``2^word``.

    Args:
        values: Any shape, finite; see `largest`.
        bits: After the point.
        word: 32 or 64.

    Returns:
        Of the same shape; ``round(values * 2^bits) mod 2^word``, halves to the even neighbour.

    Example:
        >>> encode(torch.tensor([0.5, -0.25]), bits=2).tolist(), 2**32 - 1
        ([2, 4294967295], 4294967295)
    """
    scaled = (values.double() * 2.0**bits).round().to(torch.int64).numpy()
    return scaled.astype(_unsigned(word))


def decode(words: Words, bits: int) -> Tensor:
    """The numbers of two's complement integers, float64.

    Example:
        >>> decode(encode(torch.tensor([0.5, -0.25]), bits=2), bits=2).tolist()
        [0.5, -0.25]
    """
    signed = words.view(np.int32 if words.itemsize == 4 else np.int64)
    return torch.from_numpy(signed.astype(np.float64)) * 2.0**-bits


def largest(num_terms: int, bits: int, word: int = 32) -> float:
    """What the absolute value of each of so many terms may be, so that their sum is in range.

    Example:
        >>> largest(4, bits=24)
        32.0
    """
    return 2.0 ** (word - 1 - bits) / num_terms


def rounding_bound(num_terms: int, bits: int) -> float:
    """Largest error of a sum by rounding each of its terms, ``num_terms * 2^-(bits + 1)``.

    Example:
        >>> rounding_bound(4, bits=1)
        1.0
    """
    return num_terms * 2.0 ** -(bits + 1)


def _unsigned(word: int) -> type[np.unsignedinteger[Any]]:
    return np.uint32 if word == 32 else np.uint64
