"""``fellrec ui``: the MLflow UI on the store that the runs were logged to."""

from __future__ import annotations

import argparse
import subprocess
import sys

from fellrec.cli.arguments import add_overrides

PURPOSE = "open the MLflow UI on the tracking store"
EXAMPLES = ("fellrec ui", "fellrec ui tracking.uri=sqlite:///other.db --port 5001")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_overrides(parser, lists_groups=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5000, help="port (default: 5000)")


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    from fellrec.config.compose import compose
    from fellrec.tracking.store import ui_command

    uri = compose(options.overrides).tracking.uri
    sys.stderr.write(f"MLflow UI on http://{options.host}:{options.port} for {uri}; stop it with Ctrl-C\n")
    sys.exit(subprocess.call(ui_command(uri, options.host, options.port)))
