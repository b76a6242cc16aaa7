"""Nested settings as flat ones."""

from __future__ import annotations

from typing import Any


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings as one flat dictionary with dotted keys.

    Example:
        >>> flatten({"trainer": {"num_rounds": 3}, "seed": 0})
        {'trainer.num_rounds': 3, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
