"""Arguments that several verbs share; cheap to import, for ``--help``."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_overrides(parser: argparse.ArgumentParser, lists_groups: bool = True) -> None:
    """Add the Hydra overrides.

    Args:
        parser: Of the verb.
        lists_groups: Whether the help text ends with the configuration groups and their choices.
    """
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=CHOICE or GROUP.KEY=VALUE")
    if lists_groups:
        from fellrec.config.paths import group_choices

        groups = [f"  {group:<14} {', '.join(choices)}" for group, choices in group_choices().items()]
        lines = [parser.epilog or "", "", "groups and their choices:", *groups, ""]
        parser.epilog = "\n".join([*lines, "`fellrec train --show-config` prints every setting with its value."])


def add_format(parser: argparse.ArgumentParser) -> None:
    """Add ``--format``, table or JSON."""
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="json: results only, on standard output"
    )


def add_run_dir(parser: argparse.ArgumentParser) -> None:
    """Add the directory of a finished run."""
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory of a finished run")


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add ``--trust``, for verbs that make objects from the configuration in a run directory."""
    parser.add_argument(
        "--trust",
        action="append",
        default=[],
        metavar="CLASS",
        help="a class, not of fellrec, that the run directory may name, such as my_rules.Median; may be repeated",
    )


def add_multirun(parser: argparse.ArgumentParser) -> None:
    """Add ``-m``."""
    parser.add_argument("-m", "--multirun", action="store_true", help="one run per combination of values")


def add_show_config(parser: argparse.ArgumentParser) -> None:
    """Add ``--show-config``."""
    parser.add_argument("--show-config", action="store_true", help="print the composed configuration and exit")


def check_empty(folder: Path) -> None:
    """Refuse an output directory with something in it.

    Raises:
        ConfigError: Saying what to do.
    """
    from fellrec.errors import ConfigError

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; remove it, or give another folder by --output")
