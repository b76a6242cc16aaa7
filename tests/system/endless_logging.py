"""A process that only logs and can be killed at any time: ``endless_logging.py RUN_DIR URI STEPS``."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from fellrec.tracking.run_log import NewRun, RunLog


def metrics_of(step: int) -> dict[str, float]:
    """Metrics of a step; the same after every restart."""
    return {f"a/{number:02d}": math.sin(100 * step + number) for number in range(20)} | {"nan": float("nan")}


if __name__ == "__main__":
    run_dir, uri, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    run_dir.mkdir(exist_ok=True)
    log = RunLog(run_dir, NewRun(uri, "killed", "endless", {"kind": "test"}))
    log.log_params({f"p{number}": number for number in range(250)})
    for step in range(steps):
        log.log_metrics(metrics_of(step), step, once="round")
        (run_dir / f"step_{step}.txt").write_text(str(step))
        log.log_artifact(run_dir / f"step_{step}.txt", "steps")
    log.close()
