"""Seeds derived from names and numbers, so that results do not depend on the order of execution."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def derive_seed(*parts: int | str) -> int:
    """Hash a path such as ``(seed, "train", round, client)`` to a 63-bit seed.

    Equal parts give equal seeds on every machine; different parts give independent seeds.

    Example:
        >>> derive_seed(0, "train", 1) == derive_seed(0, "train", 1)
        True
        >>> derive_seed(0, "train", 1) == derive_seed(0, "train", 2)
        False
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash integers with the finaliser of SplitMix64 (Steele, Lea, Flood 2014).

    Example:
        >>> scramble(np.array([0, 1], dtype=np.uint64)).tolist()
        [16294208416658607535, 10451216379200822465]
    """
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
