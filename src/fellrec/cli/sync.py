"""``fellrec sync``: send what runs have kept while the tracking server was away."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fellrec.errors import FellrecError
from fellrec.tracking.delivery import OutboxClient
from fellrec.tracking.outbox import num_left
from fellrec.tracking.run_log import outboxes


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb: one line per run, exit status 1 if something is left."""
    folders = dict.fromkeys(folder for run_dir in options.run_dirs for folder in outboxes(Path(run_dir).resolve()))
    left_over = 0
    for folder in folders:
        sent, left, why = _sync(folder, options.uri)
        left_over += left
        sys.stdout.write(f"{folder.parent}: {sent} sent, {left} left{f' ({why})' if why else ''}\n")
        sys.stdout.flush()
    sys.exit(1 if left_over else 0)


def _sync(folder: Path, uri: str | None) -> tuple[int, int, str]:
    before, why = num_left(folder), ""
    try:
        OutboxClient(folder, uri).send()
    except (FellrecError, OSError) as error:
        why = str(error)
    left = num_left(folder)
    return before - left, left, why
