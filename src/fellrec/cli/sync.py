"""``fellrec sync``: send the metrics that runs recorded while the MLflow server was unreachable."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

PURPOSE = "send metrics recorded while the MLflow server was unreachable"
EXAMPLES = ("fellrec sync runs/RUN", "fellrec sync runs/* --uri http://127.0.0.1:5000")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="directory of a run or of a comparison")
    parser.add_argument("--uri", help="current URI of the server (default: the URI that the run was started with)")


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb: one line per run, exit status 1 if operations remain."""
    from fellrec.tracking.run_log import outboxes

    folders = dict.fromkeys(folder for run_dir in options.run_dirs for folder in outboxes(Path(run_dir).resolve()))
    num_left = sum(_sync(folder, options.uri) for folder in folders)
    sys.exit(1 if num_left else 0)


def _sync(folder: Path, uri: str | None) -> int:
    """Send one outbox and print what was sent; returns the number of operations that remain."""
    from fellrec.errors import FellrecError
    from fellrec.tracking.delivery import OutboxClient
    from fellrec.tracking.outbox import num_left

    before, reason = num_left(folder), ""
    try:
        OutboxClient(folder, uri).send()
    except (FellrecError, OSError) as error:
        reason = f" ({error})"
    left = num_left(folder)
    sys.stdout.write(f"{folder.parent}: {before - left} sent, {left} left{reason}\n")
    sys.stdout.flush()
    return left
