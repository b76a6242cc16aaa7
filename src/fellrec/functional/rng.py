"""Seeds derived from names and numbers, so that nothing depends on the order in which code ran."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def derive_seed(*parts: int | str) -> int:
    """Turn a path such as ``(seed, "train", round, client)`` into a 63-bit seed.

    The same parts give the same seed on every machine; different parts give unrelated seeds.

    Example:
        >>> derive_seed(0, "train", 1) == derive_seed(0, "train", 1)
        True
        >>> derive_seed(0, "train", 1) == derive_seed(0, "train", 2)
        False
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014): nearby integers to unrelated ones.

    Example:
        >>> scramble(np.array([0, 1], dtype=np.uint64)).tolist()
        [16294208416658607535, 10451216379200822465]
    """
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
