"""Text that Hydra's grammar of overrides reads literally."""

from __future__ import annotations

import re


def hydra_value(text: str) -> str:
    """Quote a value if needed, so that Hydra reads it literally.

    Example:
        >>> print(hydra_value("runs/x"), hydra_value("a, b's"))
        runs/x 'a, b\\'s'
    """
    return text if re.fullmatch(r"[\w/.@+-]+", text, re.ASCII) else hydra_quoted(text)


def hydra_quoted(text: str) -> str:
    """Quote a value, so that Hydra reads it as text, also if it is a number.

    Example:
        >>> print(hydra_quoted("2026"))
        '2026'
    """
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"
