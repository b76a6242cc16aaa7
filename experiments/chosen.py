"""Prints the best settings of each rule on validation, as options for `fellrec compare`.

python experiments/chosen.py OUT/tuning/comparison/comparison.json

prints one ``--run 'aggregation=RULE …'`` per rule, quoted for ``eval`` in a shell.
"""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from fellrec.federated.settings import TrainerSettings

TRAINING = {field.name for field in fields(TrainerSettings)}


def options(comparison: dict[str, Any]) -> list[str]:
    """``--run`` and the overrides of the best line on validation, for each learned rule."""
    return [word for line in comparison["chosen_on_validation"].values() for word in ("--run", overrides(line))]


def overrides(line: str) -> str:
    """The overrides of a line of a comparison.

    Example:
        >>> overrides("fellrec alpha=0.2 learning_rate=0.002")
        'aggregation=fellrec aggregation.alpha=0.2 trainer.learning_rate=0.002'
    """
    rule, *settings = line.split()
    groups = ["trainer" if item.partition("=")[0] in TRAINING else "aggregation" for item in settings]
    return " ".join([f"aggregation={rule}", *(f"{group}.{item}" for group, item in zip(groups, settings, strict=True))])


if __name__ == "__main__":
    sys.stdout.write(f"{shlex.join(options(json.loads(Path(sys.argv[1]).read_text())))}\n")
