"""``fellrec export``: a finished run's rankings for other evaluation tools."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fellrec.cli.arguments import add_run_dir

PURPOSE = "a finished run's rankings and targets as files for ranx, RecBole or TREC tools"
EXAMPLES = ("fellrec export runs/RUN --format ranx", "fellrec export runs/RUN --format trec --output FOLDER")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_run_dir(parser)
    parser.add_argument("--format", choices=("ranx", "recbole", "trec"), required=True, help="file format")
    parser.add_argument("--output", metavar="PATH", help="output directory (default: RUN_DIR/export/FORMAT)")


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    from fellrec.report.export import export, read_table_of_run
    from fellrec.state.inside import check_inside

    run_dir = Path(options.run_dir)
    if run_dir.is_dir():
        check_inside(run_dir)
    folder = Path(options.output) if options.output else run_dir / "export" / options.format
    files = export(run_dir, options.format, folder)
    users = read_table_of_run(run_dir, "users.parquet", {"is_tied": "b"})
    sys.stdout.write(
        "".join(f"{path}\n" for path in files)
        + f"{len(users)} users; for {int(users['is_tied'].sum())} of them another item ties with the target's score\n"
    )
