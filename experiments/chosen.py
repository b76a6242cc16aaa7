"""Of a comparison that tuned rules: each rule's best settings on validation, as options of the next comparison.

python experiments/chosen.py OUT/tuning/comparison/comparison.json

prints one ``--run 'aggregation=RULE …'`` a rule, quoted for a shell; ``eval`` reads it.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from fellrec.experiment.variants import TRAINING


def options(comparison: dict[str, Any]) -> list[str]:
    """For each learned rule, ``--run`` and its overrides: those of its best line on the validation holdout."""
    return [word for line in comparison["chosen_on_validation"].values() for word in ("--run", overrides(line))]


def overrides(line: str) -> str:
    """Overrides that give a line of a comparison again.

    Example:
        >>> overrides("fellrec alpha=0.2 learning_rate=0.002")
        'aggregation=fellrec aggregation.alpha=0.2 trainer.learning_rate=0.002'
    """
    rule, *settings = line.split()
    groups = ["trainer" if item.partition("=")[0] in TRAINING else "aggregation" for item in settings]
    return " ".join([f"aggregation={rule}", *(f"{group}.{item}" for group, item in zip(groups, settings, strict=True))])


if __name__ == "__main__":
    sys.stdout.write(f"{shlex.join(options(json.loads(Path(sys.argv[1]).read_text())))}\n")
