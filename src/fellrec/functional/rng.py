"""Seeds derived from names and numbers, so that nothing depends on the order in which code ran."""

from __future__ import annotations

import hashlib


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
