"""Nested dictionaries."""

from __future__ import annotations

from typing import Any


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested dictionary to dotted keys.

    Example:
        >>> flatten({"trainer": {"num_rounds": 3}, "seed": 0})
        {'trainer.num_rounds': 3, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
