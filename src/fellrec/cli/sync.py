"""``fellrec sync``: send the metrics that runs recorded while the MLflow server was unreachable."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

PURPOSE = "send metrics recorded while the MLflow server was unreachable"
EXAMPLES = ("fellrec sync runs/RUN", "fellrec sync runs/* --uri http://127.0.0.1:5000")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR", help="directory of a run or of a comparison")
    parser.add_argument("--uri", help="current URI of the server (default: the URI that the run was started with)")


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb: one line per run, exit status 1 if operations remain or a directory is not a run's."""
    from fellrec.functional.secrets import hide
    from fellrec.tracking.known import remember
    from fellrec.tracking.store import absolute

    folders, are_runs = _outboxes(options.run_dirs)
    uri = None if options.uri is None else hide(absolute(options.uri))
    if uri is not None:
        remember(uri)
    are_sent = [_sync(folder, uri) for folder in folders]
    sys.exit(0 if are_runs and all(are_sent) else 1)


def _outboxes(run_dirs: Sequence[str]) -> tuple[list[Path], bool]:
    """The outboxes, and whether all directories are of runs; files, such as Hydra's beside runs, are skipped."""
    from fellrec.errors import ConfigError
    from fellrec.tracking.run_log import outboxes

    found: list[Path] = []
    are_runs = True
    for path in map(Path, run_dirs):
        if path.is_file():
            sys.stderr.write(f"fellrec sync: {path} is a file, skipped\n")
            continue
        try:
            found += outboxes(path.resolve())
        except ConfigError as error:
            sys.stderr.write(f"fellrec sync: {error}\n")
            are_runs = False
    return list(dict.fromkeys(found)), are_runs


def _sync(folder: Path, uri: str | None) -> bool:
    """Send one outbox and print what was sent; returns whether nothing failed and nothing remains."""
    from fellrec.errors import FellrecError
    from fellrec.tracking.delivery import OutboxClient
    from fellrec.tracking.known import confirm
    from fellrec.tracking.outbox import num_left

    client, reason = None, ""
    try:
        client = OutboxClient(folder, uri)
        if uri is None:
            confirm(client.uri, folder.parent, f"--uri {client.uri}")
        client.send()
    except (FellrecError, OSError) as error:
        reason = f" ({error})"
    num_sent = client.num_sent if client else 0
    left = num_left(folder)
    sys.stdout.write(f"{folder.parent}: {num_sent} sent, {left} left{reason}\n")
    sys.stdout.flush()
    return not reason and not left
