"""``fellrec export``: a finished run's rankings for other evaluation tools."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from fellrec.report.export import export


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    run_dir = Path(options.run_dir)
    folder = Path(options.output) if options.output else run_dir / "export" / options.format
    files = export(run_dir, options.format, folder)
    users = pd.read_parquet(run_dir / "users.parquet", columns=["is_tied"])
    sys.stdout.write(
        "".join(f"{path}\n" for path in files)
        + f"{len(users)} users, {int(users['is_tied'].sum())} of them with a target whose score another item has too\n"
    )
