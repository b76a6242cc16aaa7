"""How a run directory is told from other directories."""

from __future__ import annotations

from pathlib import Path

from fellrec.errors import shorten
from fellrec.state.nearest import similar

CONFIG = "config.yaml"
"""The configuration of a run: every run directory has it."""
RUNS = "runs.json"
"""The runs of a comparison or a sweep: their directory has it, see ``fellrec.experiment.group``."""
_MOST_RUNS = 20
"""Limit of the runs in a message."""


def which_run(folder: Path) -> str:
    """What to give instead of a directory that is not a run's, for messages.

    Args:
        folder: Without `CONFIG`. Directories of comparisons and sweeps have those of their runs.
    """
    runs = [shorten(path.parent.name) for path in sorted(folder.glob(f"*/{CONFIG}"))]
    if not runs:
        return f"give the directory of a run{similar(folder)}"
    more = f" and {len(runs) - _MOST_RUNS} others" if len(runs) > _MOST_RUNS else ""
    return f"it is a comparison or a sweep; give one of its runs: {', '.join(runs[:_MOST_RUNS])}{more}"
