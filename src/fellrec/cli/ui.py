"""``fellrec ui``: the MLflow UI on the store that the runs were logged to."""

from __future__ import annotations

import argparse
import subprocess
import sys

from fellrec.config.compose import compose
from fellrec.tracking.store import ui_command


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb."""
    config = compose(options.overrides)
    sys.stderr.write(f"MLflow UI on http://{options.host}:{options.port} for {config.tracking.uri}; Ctrl-C stops it\n")
    sys.exit(subprocess.call(ui_command(config.tracking.uri, options.host, options.port)))
