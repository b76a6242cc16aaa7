"""Settings of all aggregation rules, and what ``fellrec list`` says of them; without PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fellrec.aggregation.settings import asynchronous, averages, fairness, lora, mixing, personalised, robust

RULES: Mapping[str, Any] = {
    kind.__name__.removesuffix("Settings"): kind
    for room in (averages, fairness, lora, mixing, personalised, robust, asynchronous)
    for kind in vars(room).values()
    if isinstance(kind, type) and "about" in vars(kind)
}
"""Class name of each rule → the dataclass of its settings, whose ``about`` describes it."""

TITLES: Mapping[str, str] = {kind.about.name: kind.about.title for kind in RULES.values()}
"""Name of each rule as in ``aggregation=NAME`` → its name in tables, figures and MLflow."""
