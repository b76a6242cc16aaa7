"""``fellrec export``: a finished run's rankings for other evaluation tools, or a client's model for Transformers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from fellrec.cli.arguments import add_run_dir, add_trust
from fellrec.errors import ConfigError

PURPOSE = "a finished run's rankings for ranx, RecBole or TREC tools, or a client's model for Transformers"
EXAMPLES = (
    "fellrec export runs/RUN --format ranx",
    "fellrec export runs/RUN --format trec --output FOLDER",
    "fellrec export runs/RUN --client 3 --merge",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_run_dir(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--format", choices=("ranx", "recbole", "trec"), help="rankings and targets in this format")
    what.add_argument(
        "--merge", action="store_true", help="the model of --client, its adapter merged into the backbone"
    )
    parser.add_argument("--client", type=int, help="whose model, from 0; for --merge")
    parser.add_argument(
        "--output", metavar="PATH", help="output directory (default: RUN_DIR/export/FORMAT or …/client_NN)"
    )
    add_trust(parser)


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb.

    Raises:
        ConfigError: If ``--client`` is missing, or given where it has no effect.
    """
    from fellrec.state.inside import check_inside

    if options.merge != (options.client is not None):
        raise ConfigError("--merge needs --client N, and --format has none")
    run_dir = Path(options.run_dir)
    if run_dir.is_dir():
        check_inside(run_dir)
    if options.merge:
        _merge(run_dir, options)
    else:
        _rankings(run_dir, options)


def _rankings(run_dir: Path, options: argparse.Namespace) -> None:
    from fellrec.report.export import export, read_table_of_run

    folder = Path(options.output) if options.output else run_dir / "export" / options.format
    files = export(run_dir, options.format, folder)
    users = read_table_of_run(run_dir, "users.parquet", {"is_tied": "b"})
    sys.stdout.write(
        "".join(f"{path}\n" for path in files)
        + f"{len(users)} users; for {int(users['is_tied'].sum())} of them another item ties with the target's score\n"
    )


def _merge(run_dir: Path, options: argparse.Namespace) -> None:
    from fellrec.config.stored import read_config
    from fellrec.experiment.merge import merge

    config = read_config(run_dir, options.trust)
    folder = Path(options.output) if options.output else run_dir / "export" / f"client_{options.client:02d}"
    merge(run_dir, config, options.client, folder)
    sys.stdout.write(f"{folder}\n")
