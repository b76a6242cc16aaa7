"""``fellrec doctor``: checks of the installation and of this machine."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fellrec.cli.arguments import add_overrides

if TYPE_CHECKING:
    from omegaconf import DictConfig

PURPOSE = "check the installation, devices, directories and the tracking store; nothing is written"
EXAMPLES = ("fellrec doctor", "fellrec doctor tracking.uri=http://127.0.0.1:5000 run_dir=/scratch/runs")

_MIN_FREE_BYTES = 1e9
"""Below this much free space a run is likely to fail."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_overrides(parser, lists_groups=False)


def run(options: argparse.Namespace) -> None:
    """Entry point of the verb: one line per check, exit status 1 if one failed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fellrec.config.compose import compose
    from fellrec.errors import FellrecError
    from fellrec.report.tables import PLAIN

    table = Table(box=None, show_header=False)
    failed = False
    for name, check in _checks(compose(options.overrides)):
        try:
            table.add_row(Text("ok", style="green"), name, check())
        except (FellrecError, OSError, RuntimeError) as error:
            failed = True
            table.add_row(Text("failed", style="red"), name, str(error))
    Console(**PLAIN).print(table)
    sys.exit(1 if failed else 0)


def _checks(config: DictConfig) -> Iterator[tuple[str, Callable[[], str]]]:
    import torch

    from fellrec.config.paths import cache_dir
    from fellrec.experiment.versions import versions
    from fellrec.launch.reach import check_all_reduce

    yield "packages", lambda: ", ".join(f"{name} {number}" for name, number in versions().items())
    yield "configuration", _configuration
    yield "devices", _devices
    yield "cache folder", lambda: _writable(cache_dir(config))
    yield "run folder", lambda: _writable(Path(config.run_dir or "runs"))
    yield "tracking store", lambda: _tracking(config.tracking.uri)
    yield "gloo", lambda: check_all_reduce("gloo", 2)
    if torch.cuda.is_available():
        yield "NCCL", lambda: check_all_reduce("nccl", min(2, torch.cuda.device_count()))
    yield "SLURM", _slurm


def _configuration() -> str:
    from fellrec.config.paths import conf_dir, group_choices

    return f"{sum(map(len, group_choices().values()))} choices in {conf_dir()}"


def _devices() -> str:
    import torch

    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    found = [f"{gpu.name} with {gpu.total_memory / 1e9:.0f} GB" for gpu in gpus]
    return f"{os.cpu_count()} cores, {', '.join(found) or 'no GPU: runs use the CPU'}"


def _writable(folder: Path) -> str:
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        raise OSError(f"{existing} is not writable")
    free = shutil.disk_usage(existing).free
    if free < _MIN_FREE_BYTES:
        raise OSError(f"{folder}, only {free / 1e9:.1f} GB free")
    return f"{folder}, {free / 1e9:.0f} GB free"


def _tracking(uri: str | None) -> str:
    from fellrec.tracking.store import look_at

    return "none: runs are not tracked" if uri is None else look_at(uri)


def _slurm() -> str:
    """Version, partitions and nodes; a machine without SLURM passes."""
    absent = "not installed: fellrec submit works with --dry-run only"
    if shutil.which("sinfo") is None:
        return absent
    try:
        version, lines = _sinfo("--version"), _sinfo("--noheader", "--format=%P has %D %T").splitlines()
    except RuntimeError as error:
        if "configuration source" in str(error):
            return f"{absent} (commands found, but not configured)"
        raise
    return ", ".join([version, *lines])


def _sinfo(*arguments: str) -> str:
    try:
        done = subprocess.run(["sinfo", *arguments], capture_output=True, text=True, timeout=90, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"sinfo: no answer within {error.timeout:g} s") from error
    if done.returncode != 0:
        raise RuntimeError(f"sinfo: {done.stderr.strip()}")
    return done.stdout.strip()
