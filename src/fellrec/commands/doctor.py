"""``fellrec doctor``: what a run would find on this machine."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fellrec.build import cache_dir
from fellrec.config import compose
from fellrec.errors import FellrecError
from fellrec.layout import conf_dir, group_choices
from fellrec.records import versions

Check = tuple[str, Callable[[], str]]


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb: one line per check, exit status 1 if one failed."""
    table = Table(box=None, show_header=False)
    failed = False
    for name, check in _checks():
        try:
            table.add_row("[green]ok[/green]", name, check())
        except (FellrecError, OSError, RuntimeError) as error:
            failed = True
            table.add_row("[red]failed[/red]", name, str(error))
    Console().print(table)
    sys.exit(1 if failed else 0)


def _checks() -> Iterator[Check]:
    yield "packages", lambda: ", ".join(f"{name} {number}" for name, number in versions().items())
    yield "configuration", _configuration
    yield "devices", _devices
    yield "cache folder", lambda: _writable(cache_dir(compose([])))
    yield "run folder", lambda: _writable(Path("runs"))
    yield "tracking store", _tracking


def _configuration() -> str:
    return f"{sum(map(len, group_choices().values()))} choices in {conf_dir()}"


def _devices() -> str:
    found = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores, {', '.join(found) or 'no GPU: runs use the CPU'}"


def _writable(folder: Path) -> str:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        raise OSError(f"{existing} is not writable")
    return f"{folder}, {shutil.disk_usage(existing).free / 1e9:.0f} GB free"


def _tracking() -> str:
    from fellrec.tracking.store import make_client

    uri = compose([]).tracking.uri
    make_client(uri)
    return str(uri)
