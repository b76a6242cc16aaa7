"""The workload as overrides of fellrec's command; no heavy imports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

COMMON = (
    "data=synthetic",
    "adapter=lora",
    "adapter.dropout=0",
    "aggregation=fedavg",
    "trainer.reset_optimizer=true",
    "trainer.accelerator=cpu",
    "references.show=[]",
    "trainer.num_rounds=3",
)
"""Of all workloads: five clients, three rounds. Losses can only agree without dropout, and the rivals' clients keep no
state of an optimiser from round to round."""
TINY = ("backbone.pretrain.steps=50",)
"""Of the tiny backbone, unless another one is asked for, such as ``backbone=smollm2``."""
ROUND = ("trainer.max_local_steps=3", "trainer.batch_size=16")
"""Of the rows that time rounds."""
COMMAND = ("trainer.max_local_steps=2", "trainer.batch_size=16", "data.reader.num_users=300")
"""Of the rows that time whole commands: a short run, in which what comes before the first step counts."""


def overrides_of(family: str, size: Sequence[str], more: Sequence[str] = ()) -> list[str]:
    """Overrides of a workload.

    Args:
        family: ``retrieval`` or ``generative``; with ``pooled-`` before it, one model is trained on all clients' rows.
        size: `ROUND` or `COMMAND`.
        more: The user's, which come last.
    """
    rule = ("aggregation=centralized",) if family.startswith("pooled-") else ()
    tiny = () if any(override.startswith("backbone=") for override in more) else TINY
    return [f"objective={family.removeprefix('pooled-')}", *COMMON, *tiny, *rule, *size, *more]


def is_frozen(folder: Path, overrides: Sequence[str]) -> bool:
    """Whether a folder has the workload of these overrides."""
    mark = _mark(folder)
    return mark.is_file() and mark.read_text() == json.dumps(list(overrides))


def mark_frozen(folder: Path, overrides: Sequence[str]) -> None:
    """Note the overrides of a folder's workload."""
    _mark(folder).write_text(json.dumps(list(overrides)))


def _mark(folder: Path) -> Path:
    return folder / "overrides.json"
